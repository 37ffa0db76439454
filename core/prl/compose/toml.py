"""A table as a TOML file, and as dotted paths to its leaves. The standard library reads TOML and does not write it."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from typing import Any


def dumps(table: Mapping[str, Any]) -> str:
    """The table as TOML; `tomllib.loads` gives it back."""
    return "\n".join(_lines(table, ())).strip() + "\n"


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """Plain values first: in TOML everything after a header belongs to it."""
    lines = [f"{_key(k)} = {_inline(v)}" for k, v in table.items() if not (isinstance(v, Mapping) or _is_tables(v))]
    for key, value in table.items():
        below = (*path, _key(key))
        if isinstance(value, Mapping):
            only_tables = value and all(isinstance(item, Mapping) or _is_tables(item) for item in value.values())
            lines += [] if only_tables else ["", f"[{'.'.join(below)}]"]
            lines += _lines(value, below)
        elif _is_tables(value):
            for item in value:
                lines += ["", f"[[{'.'.join(below)}]]", *_lines(item, below)]
    return lines


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _string(key)


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return _string(value) if isinstance(value, str) else repr(value)


def _string(text: str) -> str:
    """JSON's escapes are TOML's, but for DEL, which TOML wants escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> leaf, lists by index: `environments[0].weight`."""
    if isinstance(value, Mapping) and value:
        parts = {f"{path}.{key}" if path else key: v for key, v in value.items()}
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        parts = {f"{path}[{index}]": item for index, item in enumerate(value)}
    else:
        return {path: value}
    return {leaf: v for key, item in parts.items() for leaf, v in flatten(item, key).items()}
