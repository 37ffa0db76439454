"""The rows of a JSONL file, checked line by line, and which of them are held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from prl.errors import UserError
from prl.types import Message, Split


@attrs.frozen(kw_only=True)
class Row:
    """One line of the file."""

    file: str
    line: int
    values: Mapping[str, Any]
    """As written: what the reward function is given by name."""
    messages: tuple[Message, ...]

    @property
    def place(self) -> str:
        return f"{self.file}, line {self.line}"

    @property
    def key(self) -> str:
        """Rows that ask the same are the same task to a split."""
        return hashlib.sha256(json.dumps(self.messages, sort_keys=True).encode()).hexdigest()

    @property
    def fraction(self) -> float:
        """The key as a number in [0, 1)."""
        return int(self.key[:13], 16) / 16**13


def read(file: str) -> list[Row]:
    """Every row, a row that repeats an earlier one left out; UserError names file and line of the first bad one."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {file!r} (from {Path.cwd()}): {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}") from error
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.setdefault(line.strip(), _row(file, number, line))
    return list(rows.values())


def _row(file: str, number: int, line: str) -> Row:
    place = f"{file}, line {number}"
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(values, dict):
        raise UserError(f"{place}: expected an object, got {type(values).__name__}")
    if "completion" in values:
        raise UserError(f"{place}: the key 'completion' is taken: it is the reply the function is given; rename it")
    return Row(file=file, line=number, values=values, messages=_messages(place, values))


def _messages(place: str, values: Mapping[str, Any]) -> tuple[Message, ...]:
    if ("prompt" in values) == ("messages" in values):
        both = "both" if "prompt" in values else f"neither, but {', '.join(map(repr, values)) or 'nothing'}"
        raise UserError(f"{place}: needs exactly one of 'prompt' and 'messages', has {both}")
    if "prompt" in values:
        if not isinstance(values["prompt"], str):
            raise UserError(f"{place}: 'prompt' must be a string, got {values['prompt']!r}")
        return ({"role": "user", "content": values["prompt"]},)
    messages = values["messages"]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise UserError(f"{place}: 'messages' must be a list of objects with 'role' and 'content', got {messages!r}")
    return tuple(messages)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def split_by_hash(rows: Sequence[Row], share: float) -> dict[Split, list[Row]]:
    """Rows by the hash of what they ask, so that equal prompts stay together and adding rows moves none.

    At least one prompt is held out when a share is wanted and there are two.
    """
    keys = {row.key: row.fraction for row in rows}
    held_out = {key for key, fraction in keys.items() if fraction < share}
    if share and not held_out and len(keys) > 1:
        held_out = {min(keys)}
    return {
        "train": [row for row in rows if row.key not in held_out],
        "eval": [row for row in rows if row.key in held_out],
    }


def split_by_file(rows: Sequence[Row], held_out: Sequence[Row]) -> dict[Split, list[Row]]:
    """The held-out rows, and those of the others that ask something else."""
    keys = {row.key for row in held_out}
    return {"train": [row for row in rows if row.key not in keys], "eval": list(held_out)}
