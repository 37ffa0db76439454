"""Strict reading of JSON bodies: every field is asked for by name, and what nobody asked for is refused.

Knows types and bounds, not what fields mean. Called by the endpoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from prl.serve.refusal import RefusedError


class Body:
    """A JSON object being taken apart; RefusedError 400 names the field, the value seen and what was expected.

    A field that is null counts as absent, as in OpenAI's and vLLM's APIs.
    """

    def __init__(self, value: object, path: str = "") -> None:
        if not isinstance(value, Mapping):
            raise RefusedError(400, f"{path.rstrip('.') or 'the body'} must be a JSON object, got {_seen(value)}")
        self._fields: dict[str, Any] = {name: v for name, v in value.items() if v is not None}
        self._path = path

    def integer(self, name: str, default: int | None = None, *, low: int, high: int) -> int:
        value = self._take(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self.refuse(name, f"must be an integer from {low} to {high}, got {_seen(value)}")
        return value

    def number(self, name: str, default: float, *, low: float, high: float) -> float:
        value = self._take(name, default)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.refuse(name, f"must be a number from {low:g} to {high:g}, got {_seen(value)}")
        return float(value)

    def text(self, name: str, default: str | None = None) -> str:
        value = self._take(name, default)
        if not isinstance(value, str) or len(value) > 1000:
            raise self.refuse(name, f"must be a string of at most 1000 characters, got {_seen(value)}")
        return value

    def flag(self, name: str) -> bool:
        value = self._take(name, False)
        if not isinstance(value, bool):
            raise self.refuse(name, f"must be true or false, got {_seen(value)}")
        return value

    def integers(self, name: str, default: list[int] | None = None, *, below: int, most: int) -> list[int]:
        value = self._take(name, default)
        if not isinstance(value, list) or len(value) > most:
            raise self.refuse(name, f"must be a list of at most {most} integers, got {_seen(value)}")
        for index, item in enumerate(value):
            if type(item) is not int or not 0 <= item < below:
                raise self.refuse(f"{name}[{index}]", f"must be an integer from 0 to {below - 1}, got {_seen(item)}")
        return value

    def objects(self, name: str) -> list[Body]:
        value = self._take(name, None)
        if not isinstance(value, list) or not value:
            raise self.refuse(name, f"must be a list of objects, got {_seen(value)}")
        return [Body(item, f"{self._path}{name}[{index}].") for index, item in enumerate(value)]

    def section(self, name: str) -> Body:
        """The object in field `name`, empty when it is absent."""
        return Body(self._take(name, {}), f"{self._path}{name}.")

    def rest(self) -> Mapping[str, Any]:
        """All fields that were not taken, for a reader of its own."""
        return self._fields

    def value(self, name: str) -> Any:
        """Whatever the field holds, None when it is absent."""
        return self._fields.pop(name, None)

    def has(self, name: str) -> bool:
        return name in self._fields

    def finish(self) -> None:
        """Everything this server understands was taken; refuse the rest."""
        if self._fields:
            raise self.refuse(next(iter(self._fields)), "is not supported by this engine; leave it out")

    def refuse(self, name: str, problem: str) -> RefusedError:
        return RefusedError(400, f"{self._path}{name} {problem}")

    def _take(self, name: str, default: Any) -> Any:
        value = self._fields.pop(name, default)
        if value is None:
            raise self.refuse(name, "is missing")
        return value


async def read(request: web.Request) -> Body:
    """The JSON object a request carries."""
    try:
        return Body(json.loads(await request.read()))
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON: {error}") from None


def _seen(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"
