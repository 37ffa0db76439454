"""How much one controller carries: rollouts per second, event-loop lag, memory and bytes at many rollouts in flight.

    python -m benchmarks.controller_scale              from the root of a checkout; some ten minutes
    python -m benchmarks.controller_scale --case 10000

The controller is the real one, with its hub, ledger, scheduler, credit, packing and record, in a process of its own; it
meets synthetic workers (synthetic_workers.py) over its real socket. Engines are objects in its loop that answer
prepare, commit and statistics at once. Lag is measured by a coroutine that wants to run every 5 ms: how much later it
ran than it asked to, from the first dispatch to the last step, the burst at the start included. Memory is the
controller's resident set. Results go to benchmarks/results/controller_scale.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import prl_bounded_staleness
import prl_group_relative
from prl.compose import config
from prl.dispatch import controller
from prl.dispatch.hub import Hub
from prl.providers import Engine, Environment, Model, Provider, RunInfo
from prl.run_dir import RunDir
from prl.types import Manifest
from prl_bounded_staleness import BoundedStalenessConfig
from prl_bounded_staleness.scheduler import build as scheduler
from prl_group_relative import GrpoConfig
from prl_group_relative.grpo import build as grpo

PROBE_SECONDS = 0.005
STALENESS = 7
"""Groups of 1 + STALENESS steps exist at a time; those of one or two are ready or being trained, the rest in flight."""
ENGINES, WORKERS = 4, 2
RESULTS = Path(__file__).parent / "results" / "controller_scale.json"


@attrs.frozen(kw_only=True)
class Case:
    """What is in flight. `seconds` is how long a group takes on average, `large` bytes a rollout by reference."""

    name: str
    in_flight: int
    steps: int
    group_size: int = 10
    seconds: float = 1.0
    tokens: int = 320
    large: int = 0

    @property
    def groups_per_step(self) -> int:
        return -(-self.in_flight // self.group_size // (STALENESS - 1))


CASES = (
    Case(name="100", in_flight=100, group_size=5, steps=400),
    Case(name="1000", in_flight=1000, steps=200),
    Case(name="10000", in_flight=10_000, steps=150),
    Case(name="10000 paced", in_flight=10_000, steps=40, seconds=15.0),
    Case(name="131k tokens", in_flight=96, group_size=4, steps=40, seconds=5.0, tokens=131_072),
    Case(name="131k + 80 MB", in_flight=48, group_size=4, steps=30, seconds=20.0, tokens=131_072, large=131_072 * 600),
)


# --- a run with nothing behind it -------------------------------------------------------------------------------------
class SyntheticEngine:
    """A client whose engine does as it is told, at once."""

    async def prepare(self, manifest: Manifest) -> None: ...

    async def commit(self, version: int) -> None: ...

    async def statistics(self) -> Mapping[str, float]:
        return {"version": 0, "running": 0, "waiting": 0, "generated_tokens": 0, "busy_seconds": 0.0}

    async def aclose(self) -> None: ...


PROVIDERS: dict[type, Provider] = {
    config.ModelConfig: Model(
        name="synthetic", config=config.ModelConfig, summary="", build="", weights="", render="", special_tokens=()
    ),
    config.EngineConfig: Engine(name="synthetic", config=config.EngineConfig, summary="", serve="", connect=""),
    config.EnvironmentConfig: Environment(name="toy", config=config.EnvironmentConfig, summary="", build=""),
    BoundedStalenessConfig: prl_bounded_staleness.prl_schedulers()[0],
    GrpoConfig: prl_group_relative.prl_advantages()[0],
}


@attrs.frozen(kw_only=True, eq=False)
class Composition:
    """What the controller asks of a composition; `watch` is its one plugin: lifecycle hook -> function."""

    run: config.Run
    watch: Mapping[str, Callable[..., None]]

    @property
    def hooks(self) -> Composition:
        return self

    @property
    def resolved(self) -> Mapping[str, Any]:
        """What a checkpoint's identity is made of."""
        sections = {name: {"type": "synthetic"} for name in ("model", "optimizer", "quantization")}
        return {**sections, "tokenizer": {"file": ""}, "trainer": {"ranks": 1}}

    def implementations(self, hook: str) -> Sequence[tuple[str, Callable[..., None]]]:
        return [("benchmark", self.watch[hook])] if hook in self.watch else []

    def provider(self, section: Any) -> Provider:
        return PROVIDERS[type(section)]

    def load(self, ref: str) -> Callable[[str, str], SyntheticEngine]:
        return lambda url, token: SyntheticEngine()

    def build(self, section: Any, *arguments: Any) -> Any:
        return scheduler(section, *arguments) if isinstance(section, BoundedStalenessConfig) else grpo(section)


def run_config(case: Case) -> config.Run:
    return config.Run(
        plugins=(),
        run=config.RunSection(steps=case.steps),
        model=config.ModelConfig(),
        tokenizer=config.TokenizerSection(characters="ab"),
        environments=(config.EnvironmentConfig(name="toy"),),
        rollouts=config.RolloutSection(
            groups_per_step=case.groups_per_step,
            group_size=case.group_size,
            workers=WORKERS,
            sequence_length=case.tokens,
        ),
        scheduler=BoundedStalenessConfig(max_staleness=STALENESS),
        advantage=GrpoConfig(),
        losses=config.LossesSection(rl=config.LossConfig()),
        optimizer=config.OptimizerConfig(learning_rate=1e-6),
        trainer=config.TrainerSection(micro_batch_tokens=max(8192, case.tokens)),
        quantization=config.QuantizationConfig(),
        engine=config.EngineConfig(count=ENGINES),
        weights=config.WeightTransportConfig(),
        launcher=config.LauncherConfig(),
    )


# --- measuring --------------------------------------------------------------------------------------------------------
@attrs.define
class Meter:
    """What is seen from inside the controller's process."""

    lags: list[float] = attrs.field(factory=list)
    resident: list[int] = attrs.field(factory=list)
    """MB after each step."""
    ended: list[float] = attrs.field(factory=list)
    in_flight: list[int] = attrs.field(factory=list)
    dropped: int = 0
    _probe: asyncio.Task[None] | None = None

    def run_started(self, info: RunInfo) -> None:
        self._probe = asyncio.get_running_loop().create_task(self.probe())

    def run_ended(self, info: RunInfo, error: BaseException | None) -> None:
        if self._probe is not None:
            self._probe.cancel()

    async def probe(self) -> None:
        while True:
            wanted = time.perf_counter() + PROBE_SECONDS
            await asyncio.sleep(PROBE_SECONDS)
            self.lags.append(time.perf_counter() - wanted)

    def step_ended(self, step: int, version: int, metrics: Mapping[str, Any]) -> None:
        self.ended.append(time.perf_counter())
        self.resident.append(resident_megabytes())
        self.in_flight.append(int(metrics["queue/running"]))
        self.dropped += sum(int(count) for name, count in metrics.items() if name.startswith("dropped/"))


def resident_megabytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024


def measure(case: Case, path: Path) -> dict[str, Any]:
    """Be the controller of one case to its end."""
    run_dir, meter = RunDir(path), Meter()
    run_dir.create_token()
    for file in (run_dir.config, run_dir.lock):
        file.write_text("")
    watch = {"prl_run_start": meter.run_started, "prl_step_end": meter.step_ended, "prl_run_end": meter.run_ended}
    composition: Any = Composition(run=run_config(case), watch=watch)
    hubs: list[Hub] = []
    remember(hubs)
    before = resident_megabytes()
    with peers(case, path):
        assert controller.main(composition, run_dir) == 0
    return summary(case, meter, hubs[0], before)


def remember(hubs: list[Hub]) -> None:
    """Collect the hubs that are opened from now on: the controller keeps its own to itself."""
    original = Hub.__init__

    def opened(self: Hub, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        hubs.append(self)

    Hub.__init__ = opened  # type: ignore[method-assign]


def summary(case: Case, meter: Meter, hub: Hub, before: int) -> dict[str, Any]:
    steps = len(meter.ended)
    settled = max(1 + STALENESS, steps // 4)  # the pipeline is full, allocators have warmed up
    rollouts = case.groups_per_step * case.group_size
    lags = np.array(meter.lags) * 1000
    trained = rollouts * steps
    return {
        **attrs.asdict(case),
        "rollouts_trained": trained,
        "rollouts_per_second": round(rollouts * (steps - settled) / (meter.ended[-1] - meter.ended[settled - 1]), 1),
        "rollouts_in_flight": int(np.median(meter.in_flight[settled:])) * case.group_size,
        "groups_dropped": meter.dropped,
        "lag_p50_ms": round(float(np.quantile(lags, 0.5)), 2),
        "lag_p99_ms": round(float(np.quantile(lags, 0.99)), 2),
        "lag_max_ms": round(float(lags.max()), 1),
        "resident_mb_start": before,
        "resident_mb_settled": meter.resident[settled - 1],
        "resident_mb_end": meter.resident[-1],
        "received_bytes_per_rollout": round(hub.statistics.received_bytes / trained),
        "sent_bytes_per_rollout": round(hub.statistics.sent_bytes / trained),
    }


@contextmanager
def peers(case: Case, path: Path) -> Iterator[None]:
    """Every other process of the run; they end when the controller says so."""

    def start(role: str, index: int) -> subprocess.Popen[bytes]:
        options = ("--seconds", str(case.seconds), "--tokens", str(case.tokens), "--large", str(case.large))
        command = [sys.executable, "-m", "benchmarks.synthetic_workers", str(path), "--role", role]
        return subprocess.Popen([*command, "--index", str(index), *options])

    counts = {"environment": WORKERS, "trainer": 1, "engine": ENGINES}
    with ExitStack() as stack:
        for role, count in counts.items():
            for index in range(count):
                stack.enter_context(start(role, index))
        yield


# --- the whole benchmark ----------------------------------------------------------------------------------------------
def isolated(case: Case) -> dict[str, Any]:
    """One case in a process of its own, so that its memory is its own."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("PRL_BENCHMARK_DIR")) as folder:
        command = [sys.executable, "-m", "benchmarks.controller_scale", "--case", case.name, "--inside", folder]
        finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=[case.name for case in CASES], help="only this one; nothing is written then")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = [case for case in CASES if options.case in (None, case.name)]
    if options.inside:
        print(json.dumps(measure(chosen[0], options.inside)))
        return
    results = []
    for case in chosen:
        results.append(isolated(case))
        print(json.dumps(results[-1]), flush=True)
    if options.case is None:
        RESULTS.parent.mkdir(exist_ok=True)
        machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
        RESULTS.write_text(json.dumps({"machine": machine, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
