"""The files a run writes about itself: metrics.jsonl, rollouts.jsonl and state.json. One writer, the controller.

Lines are appended and flushed, so a reader (or a crash) meets whole lines; state.json is replaced at most twice a
second.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

import attrs
import numpy as np

from prl.dispatch.change import Change
from prl.run_dir import RunDir
from prl.score.credit import Scored
from prl.types import Group, Int32, Rollout

_STATE_SECONDS = 0.5


class Record:
    """The two files that only grow."""

    def __init__(self, run_dir: RunDir) -> None:
        self._metrics = run_dir.metrics.open("a")
        self._rollouts = run_dir.rollouts.open("a")

    def metrics(self, line: Mapping[str, Any]) -> None:
        _append(self._metrics, [line])

    def rollouts(self, step: int, groups: Sequence[Scored]) -> None:
        """Every rollout a step was trained on; may be called from a thread."""
        _append(self._rollouts, rollout_lines(step, groups))

    def close(self) -> None:
        self._metrics.close()
        self._rollouts.close()


def _append(file: TextIO, lines: Iterator[Mapping[str, Any]] | Sequence[Mapping[str, Any]]) -> None:
    file.write("".join(f"{json.dumps(line)}\n" for line in lines))
    file.flush()


def rollout_lines(step: int, groups: Sequence[Scored]) -> Iterator[dict[str, Any]]:
    for scored in groups:
        for rollout, advantage in zip(scored.group.rollouts, scored.advantages, strict=True):
            yield _rollout_line(step, scored.group, rollout, advantage)


def _rollout_line(step: int, group: Group, rollout: Rollout, advantage: float) -> dict[str, Any]:
    """`versions` and `version_tokens` run-length code the versions of the sampled tokens."""
    versions, lengths = _runs(rollout.versions[rollout.sampled])
    return {
        "step": step,
        "group_id": group.group_id,
        "member": rollout.rollout_id.rpartition(".")[2],
        "task": attrs.asdict(group.task),
        "attempt": group.attempt,
        "reward": rollout.reward,
        "metrics": dict(rollout.metrics),
        "advantage": advantage,
        "versions": versions,
        "version_tokens": lengths,
        "length": rollout.sampled_count,
        "messages": [dict(message) for message in rollout.messages],
        "stop": [turn.stop.value for turn in rollout.turns],
    }


def _runs(values: Int32) -> tuple[list[int], list[int]]:
    """Each run of equal values in [n]: the value, and how often it stands there."""
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    return values[starts].tolist(), np.diff(starts, append=len(values)).tolist()


class StateFile:
    """`state.json`: what the run is doing now. `run` is the loop that writes it."""

    def __init__(self, run_dir: RunDir, *, steps: int) -> None:
        self._run_dir = run_dir
        self._change = Change()
        self._lock = threading.Lock()
        self._dirty = False
        self._state: dict[str, Any] = {
            "status": "starting",
            "step": 0,
            "steps": steps,
            "version": 0,
            "engines": [],
            "error": "",
            "updated": 0.0,
            "metrics": {},
        }
        self.write()

    def update(self, **fields: Any) -> None:
        """Change some of `status`, `step`, `version`, `engines` (URLs), `error`, `metrics`; written soon."""
        self._state.update(fields)
        self._dirty = True
        self._change.notify()

    def write(self) -> None:
        """Write now; from any thread, and the last to come writes last."""
        with self._lock:
            self._dirty = False
            self._run_dir.write_json(self._run_dir.state, {**self._state, "updated": time.time()})

    async def run(self) -> None:
        while True:
            await self._change.until(lambda: self._dirty)
            await asyncio.to_thread(self.write)
            await asyncio.sleep(_STATE_SECONDS)
