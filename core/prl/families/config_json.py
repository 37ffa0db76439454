"""A family's config.json, both ways: which key says which size, and whether a checkpoint asks for more than there is.

Imports no torch: sizes are needed where configs are checked. Called by model plugins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prl.errors import UserError


def read(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """`config.json` of the folder `model.checkpoint` names, and where it is; a part for text is lifted to the top."""
    file = Path(folder) / "config.json"
    try:
        stored = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"model.checkpoint: cannot read {file}: {error}") from error
    if not isinstance(stored, dict):
        raise UserError(f"model.checkpoint: {file} holds {type(stored).__name__}, where a config is an object")
    text = stored.get("text_config")
    return file, {**stored, **text} if isinstance(text, dict) else stored


def sizes(file: Path, stored: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """Field -> value, for `keys` field -> key; UserError lists every key that is missing or no number."""
    wrong = [
        f"{key} = {stored[key]!r}" if key in stored else f"no {key}"
        for key in keys.values()
        if not isinstance(stored.get(key), int | float) or isinstance(stored.get(key), bool)
    ]
    if wrong:
        raise UserError(f"{file} does not say every size: {', '.join(wrong)}")
    return {field: stored[key] for field, key in keys.items()}


def written(sizes: Any, keys: Mapping[str, str]) -> dict[str, Any]:
    """The reverse of `sizes`: key -> the value of that field of `sizes`."""
    return {key: getattr(sizes, field) for field, key in keys.items()}


def check(file: Path, stored: Mapping[str, Any], written: Mapping[str, Any], *, except_for: tuple[str, ...]) -> None:
    """UserError unless `stored` says, where it says something, what prl would write for the same model."""
    differing = [
        f"{key} = {stored[key]!r}, where only {value!r} is supported"
        for key, value in written.items()
        if stored.get(key) is not None and key not in except_for and stored[key] != value
    ]
    if differing:
        raise UserError(f"{file} asks for another model than this plugin builds: {'; '.join(differing)}")


def rope(file: Path, stored: Mapping[str, Any], *, kind: str) -> Mapping[str, Any]:
    """Rotary positions, with their `rope_theta`; UserError unless they are of this kind.

    transformers 5 writes `rope_parameters`, earlier releases `rope_theta` beside `rope_scaling`.
    """
    said = stored.get("rope_parameters") or stored.get("rope_scaling") or {}
    found = {"rope_theta": stored.get("rope_theta"), **said} if isinstance(said, dict) else {}
    seen = found.get("rope_type", found.get("type", "default"))
    if seen != kind or not isinstance(found.get("rope_theta"), int | float):
        raise UserError(f"{file}: rotary positions {said or found} are not supported, only {kind} with a rope_theta")
    return found
