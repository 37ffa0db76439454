"""Records what a real vLLM server says of itself while it is overloaded, for the tests of the scheduler `adaptive`.

    python benchmarks/overload_stories.py tests/plugins/overload

Needs the CPU build of vLLM. One JSON object a line: seconds, groups in flight, groups arrived, and the loads of the
engines as `EngineLoad` has them. `storm`: caches too small for what runs; `queue`: more requests than decode at once,
until no new ones come; `calm`: fewer than fit.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import attrs
from prl.providers import EngineLoad
from prl.types import Sampling

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.plugins.served_vllm import Served, serving

GROUP, LENGTH, POLL = 4, 512, 1.0
NAMES = [field.name for field in attrs.fields(EngineLoad) if field.name != "engine"]


@attrs.define
class Story:
    """A closed loop of `groups` groups of rollouts, and what the engines say meanwhile."""

    engine: Served
    groups: int
    tokens: int
    running: int = 0
    arrived: int = 0

    async def tell(self, seconds: float, *, quiet_after: float) -> list[dict[str, Any]]:
        began = time.monotonic()
        lines: list[dict[str, Any]] = []
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._roll(index, began + quiet_after)) for index in range(self.groups)]
            while (at := time.monotonic() - began) < seconds:
                loads = [await self._load()]
                lines.append({"at": round(at, 2), "running": self.running, "arrived": self.arrived, "loads": loads})
                await asyncio.sleep(POLL)
            for task in tasks:
                task.cancel()
        return lines

    async def _load(self) -> dict[str, float]:
        said = await self.engine.client.statistics()
        return {"engine": 0, **{name: round(float(said[name]), 3) for name in NAMES}}

    async def _roll(self, index: int, until: float) -> None:
        number = 0
        while time.monotonic() < until:
            prompt = [3 + (index * 7 + number + place) % 40 for place in range(8 + index % 5)]
            sampling = Sampling(max_tokens=self.tokens - 37 * (index % 6), seed=1000 * index + number)
            self.running += 1
            await self.engine.client.generate(prompt, sampling, stop=[], n=GROUP)
            self.running, self.arrived, number = self.running - 1, self.arrived + 1, number + 1


def record(path: Path, *edits: str, seconds: float, quiet: float = 1e9, **story: int) -> None:
    edits = ("model.layers=2", f"engine.length={LENGTH}", *edits)
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "run", *edits) as engine:
        engine.publish(0, seed=1)
        engine.generate([3, 4, 5], max_tokens=8)  # the first takes longer than those after it
        work = Story(engine, **story).tell(seconds, quiet_after=quiet)
        lines = engine.background.run(work, timeout=seconds + 120)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    small, large = "engine.kv_cache_bytes=8388608", "engine.kv_cache_bytes=67108864"
    record(folder / "storm.jsonl", small, "engine.sequences=64", groups=12, tokens=480, seconds=60.0)
    record(folder / "queue.jsonl", large, "engine.sequences=8", groups=12, tokens=300, seconds=40.0, quiet=24.0)
    record(folder / "calm.jsonl", large, "engine.sequences=64", groups=2, tokens=200, seconds=15.0)


if __name__ == "__main__":
    main()
