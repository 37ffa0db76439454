"""A process of a benchmark with two sides: told what to do in lines, answers with one line of JSON each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from prl.supervise.devices import VISIBLE

from benchmarks.vllm_gpu import ROOT


class Side:
    """`python -m words...` on one GPU, or on what there is for an empty `device`."""

    def __init__(self, words: Sequence[str], device: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", *words],
            env={**os.environ, **({VISIBLE: device} if device else {})},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def heard(self) -> dict[str, Any]:
        """What it says next; that it ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                said: dict[str, Any] = json.loads(line)
                return said
        return {"error": f"ended with exit code {self._process.wait()}"}

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def say(**what: Any) -> None:
    """On the side that is asked."""
    print(json.dumps(what), flush=True)
