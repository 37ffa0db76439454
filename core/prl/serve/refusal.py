"""What the engine says no with: a status of HTTP and a sentence, in the shape of OpenAI's errors."""

from __future__ import annotations

import json
from typing import Any


class RefusedError(Exception):
    """A request that is not done; `status` is HTTP's."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.status}}


def sentence_in(body: bytes) -> str:
    """The sentence of an error's body, or the body in one line: who else may have answered writes pages."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return " ".join(body[:500].decode(errors="replace").split())
