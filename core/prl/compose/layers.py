"""Config files to one table: `extends`, `--plugins`, `--set`.

Layers, weakest first: the files of `extends`, left to right; the file itself; `--set`. Tables merge key by key, other
values replace; a table whose `type` is changed by a stronger layer keeps nothing of the weaker one, since its keys
belonged to another provider; `plugins` lists are united, base first. Knows nothing of what the keys mean.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from prl.compose.discover import did_you_mean
from prl.errors import ConfigError, Problem

Table: TypeAlias = dict[str, Any]


def resolve(source: Path, *, plugins: str = "", overrides: Sequence[str] = ()) -> tuple[Table, list[Problem]]:
    """The merged table of a config file and the command line, and what was wrong with the latter.

    Raises ConfigError for a file that cannot be read: nothing more can be said about it.
    """
    table = read(source)
    problems = _apply_overrides(table, overrides)
    problems += _edit_plugins(table, plugins)
    return table, problems


# --- files ------------------------------------------------------------------------------------------------------------
def read(source: Path, above: tuple[Path, ...] = ()) -> Table:
    """A config file merged onto what it extends; `above` are the files that extend it, outermost first."""
    if source.resolve() in above:
        raise ConfigError(str(source), [Problem("extends", "extends itself, directly or through another file")])
    table = _parse(source)
    bases = table.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(str(source), [Problem("extends", f"expected a path or an array of paths, got {bases!r}")])
    merged: Table = {}
    for base in bases:
        merged = merge(merged, read(source.parent / base, (*above, source.resolve())))
    return merge(merged, table)


def _parse(source: Path) -> Table:
    try:
        return tomllib.loads(source.read_text())
    except OSError as error:
        raise ConfigError(str(source), [Problem("", f"cannot be read: {error.strerror}")]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(source), [Problem("", f"is not valid TOML: {error}")]) from error


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> Table:
    """`overlay` over `base`, neither changed.

    Example:
        >>> merge({"loss": {"type": "a", "x": 1}}, {"loss": {"type": "b"}})
        {'loss': {'type': 'b'}}
    """
    if "type" in overlay and overlay["type"] != base.get("type", overlay["type"]):
        return dict(overlay)
    merged = dict(base)
    for key, value in overlay.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = merge(old, value)
        elif key == "plugins" and isinstance(old, list) and isinstance(value, list):
            merged[key] = old + [name for name in value if name not in old]
        else:
            merged[key] = value
    return merged


# --- command line -----------------------------------------------------------------------------------------------------
def _edit_plugins(table: Table, edits: str) -> list[Problem]:
    """`x,no:y`: append x, remove y."""
    names = table.setdefault("plugins", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        table["plugins"] = []
        return [Problem("plugins", f"expected an array of plugin names, got {names!r}")]
    problems = []
    names = list(dict.fromkeys(names))
    for edit in filter(None, (part.strip() for part in edits.split(","))):
        name = edit.removeprefix("no:")
        if edit == name:
            names += [name] if name not in names else []
        elif name in names:
            names.remove(name)
        else:
            problems.append(Problem("plugins", f"--plugins {edit}: not in the list{did_you_mean(name, names)}"))
    table["plugins"] = names
    return problems


def _apply_overrides(table: Table, overrides: Sequence[str]) -> list[Problem]:
    problems = []
    # A changed type drops its section's keys, so types go first: the order of --set then does not matter.
    for override in sorted(overrides, key=lambda o: o.partition("=")[0].split(".")[-1].strip() != "type"):
        path, equals, value = override.partition("=")
        keys = path.strip().replace("[", ".").replace("]", "").split(".")
        if not equals or not all(keys):
            problems.append(Problem(path, f"--set {override}: expected section.key=value"))
            continue
        try:
            _set(table, keys, _value(value.strip()))
        except LookupError as error:
            problems.append(Problem(path, f"--set {override}: {error.args[0]}"))
    return problems


def _value(text: str) -> Any:
    """A TOML value, or the text itself, so that strings need no quotes inside the shell's."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(table: Table, path: Sequence[str], value: Any) -> None:
    parent: Any = table
    for index, key in enumerate(path[:-1]):
        parent = _step(parent, key, where=".".join(path[:index]))
    where, last = ".".join(path[:-1]), path[-1]
    if isinstance(parent, list):
        parent[_index(parent, last, where)] = value
    elif not isinstance(parent, dict):
        raise LookupError(f"{where} is {parent!r}, not a table")
    elif last == "type" and parent.get("type", value) != value:
        parent.clear()
        parent["type"] = value
    else:
        parent[last] = value


def _step(parent: Any, key: str, *, where: str) -> Any:
    if isinstance(parent, list):
        return parent[_index(parent, key, where)]
    if not isinstance(parent, dict):
        raise LookupError(f"{where} is {parent!r}, not a table")
    return parent.setdefault(key, {})


def _index(array: Sequence[Any], key: str, where: str) -> int:
    if not key.isdigit() or int(key) >= len(array):
        count = f"{len(array)} {'entry' if len(array) == 1 else 'entries'}"
        raise LookupError(f"{where} has {count}, counted from 0; there is no {key!r}")
    return int(key)
