"""TOML tables to the attrs classes of `config.py` and of providers, strictly, and back.

Nothing is coerced except an integer where a float is wanted. Every problem of a config is found in one pass: each comes
with its dotted path, the value seen and, for a misspelt word, what was probably meant. Knows no file and no plugin: the
registry says which class a section's `type` chooses.
"""

from __future__ import annotations

import datetime
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import attrs
import cattrs
from cattrs.strategies import configure_union_passthrough

from prl.compose.config import SECTION_KINDS, Run
from prl.compose.discover import did_you_mean
from prl.compose.registry import Registry
from prl.errors import Problem

ExplainUnknown: TypeAlias = Callable[[str, str], str | None]
"""(kind, name) -> what to say about a `type` nothing in the run provides; None when it would only be a follow-up."""


class StructureError(ValueError):
    """Problems of one value, with paths relative to it; may be empty when they are reported elsewhere."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = problems
        super().__init__("; ".join(p.message for p in problems))


def structure(raw: Mapping[str, Any], registry: Registry, explain_unknown: ExplainUnknown) -> Run:
    """A whole config; StructureError carries every problem."""
    run: Run = _Structurer(registry, explain_unknown).converter.structure(raw, Run)
    return run


def unstructure(value: Any, registry: Registry) -> Any:
    """The TOML value of a config object: sections get their `type` back, defaults are written out, None is left out."""
    if attrs.has(type(value)):
        fields = {f.alias: getattr(value, f.name) for f in attrs.fields(type(value)) if f.init}
        table = {key: unstructure(v, registry) for key, v in fields.items() if v is not None}
        is_section = isinstance(value, tuple(SECTION_KINDS))
        return {"type": registry.of_config(type(value)).provider.name, **table} if is_section else table
    if isinstance(value, Mapping):
        return {key: unstructure(v, registry) for key, v in value.items() if v is not None}
    if isinstance(value, Sequence | frozenset | set) and not isinstance(value, str):
        return [unstructure(v, registry) for v in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


class _Structurer:
    """A cattrs converter whose hooks collect instead of stopping at the first problem."""

    def __init__(self, registry: Registry, explain_unknown: ExplainUnknown) -> None:
        self._registry = registry
        self._explain_unknown = explain_unknown
        self.converter = converter = cattrs.Converter(forbid_extra_keys=True)
        configure_union_passthrough(bool | int | float | str, converter)
        for kind in (bool, int, float, str):
            converter.register_structure_hook(kind, _exactly(kind))
        converter.register_structure_hook(Path, _path)
        converter.register_structure_hook_func(attrs.has, self._table)
        converter.register_structure_hook_func(lambda cls: cls in SECTION_KINDS, self._section)
        converter.register_structure_hook_func(_is_array, self._array)
        converter.register_structure_hook_func(_is_mapping, self._mapping)
        converter.register_structure_hook_func(_is_literal, _literal)

    def _section(self, raw: Any, base: type) -> Any:
        """A section that a plugin provides: its `type` chooses the class."""
        kind = SECTION_KINDS[base]
        fields = dict(_expect_table(raw))
        if "type" not in fields:
            raise StructureError([Problem("type", f"missing: which {kind}?{self._choices(kind)}")])
        name = fields.pop("type")
        entry = self._registry.find(kind, name) if isinstance(name, str) else None
        if entry is None:
            sentence = self._explain_unknown(kind, str(name))
            raise StructureError([Problem("type", sentence)] if sentence else [])
        if kind == "environment":
            fields["name"] = fields.get("name") or name
        return self.converter.structure(fields, entry.provider.config)

    def _choices(self, kind: str) -> str:
        names = self._registry.names(kind)
        if not names:
            return " No plugin of this run provides one"
        return f" This run's plugins provide {', '.join(map(repr, names))}"

    def _table(self, raw: Any, cls: Any) -> Any:
        table = _expect_table(raw)
        hints = get_type_hints(cls)
        fields = {f.alias: f for f in attrs.fields(cls) if f.init}
        values: dict[str, Any] = {}
        problems = [Problem(key, _unknown_key(key, fields)) for key in table if key not in fields]
        for key, field in fields.items():
            if key not in table:
                problems += self._missing(key, field, hints[field.name])
                continue
            try:
                values[key] = self.converter.structure(table[key], hints[field.name])
            except Exception as error:  # whatever a hook or a plugin's class raises belongs to this key
                problems += _located(key, error)
        required = {key for key, f in fields.items() if f.default is attrs.NOTHING or key in table}
        whole = not problems and required <= values.keys()
        instance = _construct(cls, values) if whole else types.SimpleNamespace(**values)
        problems += _out_of_bounds(fields.values(), instance)
        if problems or not whole:
            raise StructureError(problems)
        return instance

    def _missing(self, key: str, field: attrs.Attribute[Any], hint: Any) -> list[Problem]:
        if field.default is not attrs.NOTHING:
            return []
        what = field.metadata.get("help", "required")
        element = get_args(hint)[0] if _is_array(hint) else hint
        if element in SECTION_KINDS:
            noun = "missing section" if element is hint else "needs at least one section"
            return [Problem(key, f"{noun} ({what}).{self._choices(SECTION_KINDS[element])}")]
        return [Problem(key, f"missing {'section' if attrs.has(element) else 'key'} ({what})")]

    def _array(self, raw: Any, hint: Any) -> Any:
        if not isinstance(raw, list | tuple):
            raise TypeError(f"expected an array, got {_seen(raw)}")
        (element, *_) = get_args(hint) or (Any,)
        values: list[Any] = []
        problems: list[Problem] = []
        for index, item in enumerate(raw):
            try:
                values.append(self.converter.structure(item, element))
            except Exception as error:  # as in _table
                problems += _located(f"[{index}]", error)
        if len(values) < len(raw):
            raise StructureError(problems)
        return values if get_origin(hint) is list else tuple(values)

    def _mapping(self, raw: Any, hint: Any) -> Any:
        table = _expect_table(raw)
        (_, element) = get_args(hint) or (str, Any)
        values: dict[str, Any] = {}
        problems: list[Problem] = []
        for key, item in table.items():
            try:
                values[key] = self.converter.structure(item, element)
            except Exception as error:  # as in _table
                problems += _located(key, error)
        if len(values) < len(table):
            raise StructureError(problems)
        return values


# --- leaves -----------------------------------------------------------------------------------------------------------
def _exactly(kind: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    def leaf(value: Any, _: Any) -> Any:
        if type(value) is kind or (kind is float and type(value) is int):
            return kind(value)
        raise TypeError(f"expected {getattr(kind, '__name__', kind)}, got {_seen(value)}")

    return leaf


def _path(value: Any, _: Any) -> Path:
    if not isinstance(value, str):
        raise TypeError(f"expected a path, got {_seen(value)}")
    return Path(value)


def _literal(value: Any, hint: Any) -> Any:
    choices = get_args(hint)
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    meant = did_you_mean(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
    raise ValueError(f"expected one of {', '.join(map(repr, choices))}, got {_seen(value)}{meant}")


def _is_literal(hint: Any) -> bool:
    origin: Any = get_origin(hint)
    return origin is Literal


def _is_array(hint: Any) -> bool:
    arguments = get_args(hint)
    if get_origin(hint) is tuple:
        return len(arguments) == 2 and arguments[1] is Ellipsis
    return get_origin(hint) in (list, Sequence)


def _is_mapping(hint: Any) -> bool:
    return get_origin(hint) in (dict, Mapping)


def _expect_table(raw: Any) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise TypeError(f"expected a table, got {_seen(raw)}")
    return raw


# --- what to say ------------------------------------------------------------------------------------------------------
def _seen(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a table with {', '.join(value) or 'no keys'}"
    name = "array" if isinstance(value, list | tuple) else type(value).__name__
    shown = value.isoformat() if isinstance(value, datetime.date | datetime.time) else repr(value)
    return f"{name} {shown if len(shown) <= 80 else shown[:77] + '...'}"


def _unknown_key(key: str, known: Iterable[str]) -> str:
    names = ", ".join(sorted(known)) or "none"
    return f"unknown key {key!r}{did_you_mean(key, known) or f' (known keys: {names})'}"


def _located(key: str, error: BaseException) -> list[Problem]:
    """Problems of a value, with the key it lies under put before their paths."""
    if isinstance(error, StructureError):
        return [Problem(_join(key, p.path), p.message) for p in error.problems]
    if isinstance(error, cattrs.BaseValidationError):
        return [Problem(key, message) for message in cattrs.transform_error(error)]
    return [Problem(key, _sentence(error))]


def _join(key: str, path: str) -> str:
    return f"{key}.{path}" if path and not path.startswith("[") else f"{key}{path}"


def _sentence(error: BaseException) -> str:
    """What an error says: attrs puts the sentence first and the values it was made from behind it."""
    return str(error.args[0]) if error.args else type(error).__name__


def _construct(cls: Any, values: Mapping[str, Any]) -> Any:
    """The object without its validators, which would stop at the first; `_out_of_bounds` runs them all."""
    try:
        with attrs.validators.disabled():
            return cls(**values)
    except (ValueError, TypeError) as error:
        raise StructureError([Problem("", _sentence(error))]) from error


def _out_of_bounds(fields: Iterable[attrs.Attribute[Any]], instance: Any) -> list[Problem]:
    """Run every validator on an object, or on as much of it as could be structured."""
    problems: list[Problem] = []
    for field in fields:
        if field.validator is None or not hasattr(instance, field.name):
            continue
        try:
            field.validator(instance, field, getattr(instance, field.name))
        except AttributeError:
            # It reads fields that could not be structured; those problems come first.
            if not isinstance(instance, types.SimpleNamespace):
                raise
        except (ValueError, TypeError) as error:
            problems.append(Problem(field.alias or field.name, _bound(field, error)))
    return problems


def _bound(field: attrs.Attribute[Any], error: BaseException) -> str:
    """`'steps' must be > 0: -1`, as attrs says it, to `must be > 0, got -1`."""
    sentence = _sentence(error)
    rule, colon, value = sentence.removeprefix(f"'{field.name}' ").rpartition(": ")
    return f"{rule}, got {value}" if colon and rule.startswith("must be") else sentence
