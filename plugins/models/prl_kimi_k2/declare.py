"""Tool declarations of Kimi-K2.5 and later: JSON schemas written as TypeScript types.

Follows `encode_tools_to_typescript_style` of the published tokenizer, which sorts every object by key before it writes.
Called by this plugin's renderer; knows no tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from prl.errors import UserError
from prl.rollout.tool_calls import function_of

if TYPE_CHECKING:
    from prl.types import Tool

Schema: TypeAlias = "Mapping[str, Any] | bool"

_INDENT = "  "
_UNION = {"integer": "number", "object": "{}", "array": "Array<any>"}
"""How a type is written in a list of types; others as they are."""
_BOUNDS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
"""Constraints that are told in a comment, per type."""
_SELF = "parameters"
"""What a schema that refers to its own root is called."""


def typescript(tools: Sequence[Tool]) -> str:
    """The body of the `tool_declare` message. UserError when a schema cannot be written as a type."""
    functions = "\n".join(_function(function_of(tool)) for tool in tools)
    return f"# Tools\n\n## functions\nnamespace functions {{\n{functions}\n}}\n"


def _function(function: Mapping[str, Any]) -> str:
    name, parameters = function["name"], function.get("parameters") or {}
    definitions = parameters.get("$defs", {})
    try:
        interfaces = [_interface(key, definitions[key]) for key in sorted(definitions)]
        argument = _object(parameters, "")
        if _refers_to_root(parameters):
            interfaces.insert(0, _root(parameters))
            argument = _SELF
    except ValueError as error:
        raise UserError(f"tool {name!r}: {error}; Kimi declares tools as TypeScript types") from None
    return "".join(interfaces) + _comment(function.get("description"), "") + f"type {name} = (_: {argument}) => any;"


def _interface(name: str, schema: Schema) -> str:
    return _comment(_of(schema, "description"), "") + f"interface {name} {_type(schema, '')}\n"


def _root(parameters: Mapping[str, Any]) -> str:
    fields = _fields(parameters, _INDENT, sorted(parameters.get("properties", {})))
    return f"interface {_SELF} {{\n" + ",\n".join(fields) + "\n}\n"


def _type(schema: Schema, indent: str) -> str:
    """The type itself, without what is told in comments above it."""
    if isinstance(schema, bool) or not schema:
        return "null" if schema is False else "any"
    if "$ref" in schema:
        return _reference(schema["$ref"])
    if "anyOf" in schema:
        return " | ".join(_type(branch, indent) for branch in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(f'"{value}"' if isinstance(value, str) else json.dumps(value) for value in schema["enum"])
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join(str(_UNION.get(one, one)) for one in kind)
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        return _array(schema, indent)
    if not isinstance(kind, str):
        raise ValueError(f"no type in the schema {dict(schema)!r}")
    return "number" if kind == "integer" else kind


def _reference(reference: str) -> str:
    if reference == "#":
        return _SELF
    if not reference.startswith("#/$defs/"):
        raise ValueError(f"the reference {reference!r} does not start with '#/$defs/'")
    return reference.rpartition("/")[2]


def _object(schema: Mapping[str, Any], indent: str) -> str:
    required = set(schema.get("required", ()))
    names = sorted(schema.get("properties", {}), key=lambda name: (name not in required, name))
    fields = _fields(schema, indent + _INDENT, names)
    additional = schema.get("additionalProperties")
    if additional is not None:
        others = "never" if additional is False else _type(additional, indent + _INDENT)
        fields.append(f"{indent + _INDENT}[k: string]: {others}")
    return "{\n" + ",\n".join(fields) + f"\n{indent}}}" if fields else "{}"


def _fields(schema: Mapping[str, Any], indent: str, names: Sequence[str]) -> list[str]:
    required = set(schema.get("required", ()))
    return [_field(name, schema["properties"][name], indent, optional=name not in required) for name in names]


def _field(name: str, schema: Schema, indent: str, *, optional: bool) -> str:
    default = _of(schema, "default")
    told = "" if default is None else f"{indent}// Default: {json.dumps(default, ensure_ascii=False)}\n"
    return f"{_told(schema, indent)}{told}{indent}{name}{'?' if optional else ''}: {_type(schema, indent)}"


def _array(schema: Mapping[str, Any], indent: str) -> str:
    items, inner = schema.get("items") or {}, indent + _INDENT
    told = _told(items, inner)
    if not told:
        return f"Array<{_type(items, indent)}>"
    return f"Array<\n{told}{inner}{_type(items, inner)}\n{indent}>"


def _told(schema: Schema, indent: str) -> str:
    """Description and constraints, as comments above what they speak about."""
    bounds = _BOUNDS.get(str(_of(schema, "type")), ()) if not _is_choice(schema) else ()
    constraints = ", ".join(f"{key}: {_of(schema, key)}" for key in bounds if _of(schema, key) is not None)
    return _comment(_of(schema, "description"), indent) + (f"{indent}// {constraints}\n" if constraints else "")


def _is_choice(schema: Schema) -> bool:
    return any(_of(schema, key) is not None for key in ("$ref", "anyOf", "enum"))


def _comment(text: str | None, indent: str) -> str:
    if not text:
        return ""
    return "".join(f"{indent}// {line}\n" if line else "\n" for line in text.split("\n"))


def _of(schema: Schema, key: str) -> Any:
    return schema.get(key) if isinstance(schema, Mapping) else None


def _refers_to_root(value: Any) -> bool:
    if isinstance(value, Mapping):
        return value.get("$ref") == "#" or any(map(_refers_to_root, value.values()))
    return isinstance(value, list) and any(map(_refers_to_root, value))
