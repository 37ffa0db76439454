"""A run around a real controller: workers that speak real messages through the real hub, with nothing behind them.

Workers are threads with the blocking connection that trainer ranks use; engines are objects in the controller's loop.
What is held, answered or refused is decided by the test.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import prl_bounded_staleness
import prl_group_relative
from prl.checkpoint_dir import write_json
from prl.columns import ColumnFolder
from prl.compose import config
from prl.compose.config import Run
from prl.dispatch.controller import Controller
from prl.errors import InfrastructureError
from prl.messages import (
    TO_WORKER,
    Cancel,
    Demonstrate,
    Demonstrations,
    Failed,
    GroupDone,
    Hello,
    InFlightKept,
    KeepInFlight,
    Publish,
    Retire,
    RunGroup,
    Save,
    Saved,
    StepDone,
    Stop,
    TrainStep,
)
from prl.providers import Engine, Environment, Model, Provider, Tracker
from prl.run_dir import RunDir, read_json
from prl.types import (
    Carried,
    Failure,
    Group,
    Manifest,
    Message,
    Rollout,
    Sample,
    Sampling,
    StopReason,
    TensorRecord,
    Turn,
)
from prl.wire import Connection
from prl_bounded_staleness import BoundedStalenessConfig
from prl_group_relative import GrpoConfig

TRAIN_TASKS, EVAL_TASKS = 1000, 7


# --- tokens -----------------------------------------------------------------------------------------------------------
def rollout(
    rollout_id: str,
    *,
    version: int = 0,
    reward: float = 0.0,
    prompt: int = 2,
    sampled: int = 3,
    temperature: float = 1.0,
) -> Rollout:
    """`prompt` tokens that were given and `sampled` ones that `version` sampled."""
    length = prompt + sampled
    mask = np.arange(length) >= prompt
    messages: tuple[Message, ...] = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"})
    return Rollout(
        rollout_id=rollout_id,
        tokens=np.arange(length, dtype=np.int32),
        sampled=mask,
        logprobs=np.where(mask, -0.5, 0.0).astype(np.float32),
        versions=np.where(mask, version, -1).astype(np.int32),
        temperature=temperature,
        turns=(Turn(start=prompt, end=length, stop=StopReason.STOP),),
        messages=messages,
        reward=reward,
        metrics={"accuracy": float(reward > 0)},
    )


def answer(request: RunGroup, *, version: int | None = None, failed: int = 0, where: str = "environment") -> Group:
    """The group a request asks for, sampled by `version`; its last `failed` rollouts are failures."""
    sampled_by = request.version if version is None else version
    kept = request.size - failed
    return Group(
        group_id=request.group_id,
        task=request.task,
        attempt=request.attempt,
        started_version=request.version,
        rollouts=tuple(_sibling(request, i, sampled_by) for i in range(kept)),
        failures=tuple(
            Failure(rollout_id=f"{request.group_id}.{i}", where=where, error="broke") for i in range(kept, request.size)
        ),
    )


def answer_with_columns(folder: ColumnFolder) -> Callable[[RunGroup], Group]:
    """As `answer`, where every rollout has a large column `x` [L, 2] of its reward."""

    def with_column(rollout: Rollout, request: RunGroup) -> Rollout:
        column = np.full((len(rollout.tokens), 2), int(rollout.reward), dtype=np.uint8)
        written = folder.write({"x": column}, group_id=request.group_id, attempt=request.attempt)
        return attrs.evolve(rollout, large={"x": (written["x"],)})

    def reply(request: RunGroup) -> Group:
        group = answer(request)
        return attrs.evolve(group, rollouts=tuple(with_column(rollout, request) for rollout in group.rollouts))

    return reply


def columns_of(step: TrainStep, folder: ColumnFolder) -> list[np.ndarray[Any, Any]]:
    """The columns `x` of a step's samples, read as a rank does."""
    micro_batches = [micro for rank in step.batch.ranks for micro in rank]
    return [folder.read(piece) for micro in micro_batches for (piece,) in micro.large["x"]]


def _sibling(request: RunGroup, member: int, version: int) -> Rollout:
    name, reward = f"{request.group_id}.{member}", float(member % 2)
    return rollout(name, version=version, reward=reward, temperature=request.sampling.temperature)


def demonstration(index: int) -> Sample:
    length = 3 + index % 4
    said = (np.arange(length) >= 1).astype(np.float32)
    zeros = np.zeros(length, dtype=np.float32)
    return Sample(
        tokens=np.full(length, index, dtype=np.int32),
        sampled=np.zeros(length, dtype=np.bool_),
        engine_logprobs=zeros,
        versions=np.full(length, -1, dtype=np.int32),
        advantages=zeros,
        temperature=1.0,
        weights={"ce": said},
    )


def manifest(version: int) -> Manifest:
    record = TensorRecord(name="w", dtype="float32", shape=(1,), offset=0, nbytes=4, checksum=0)
    return Manifest.single(version=version, location=f"v{version}", tensors=(record,))


# --- workers ----------------------------------------------------------------------------------------------------------
@attrs.define(eq=False)
class FakeEnvironment:
    """An environment worker; `reply` answers a group, None leaves it unanswered until it is cancelled."""

    reply: Callable[[RunGroup], Group | Failed | None] = answer
    asked: list[RunGroup] = attrs.field(factory=list)
    cancelled: list[int] = attrs.field(factory=list)
    keep: Callable[[KeepInFlight], tuple[Carried, ...]] = lambda order: ()
    """Writes what is finished of the groups it has not answered."""
    environments: tuple[str, ...] = ("toy",)
    pid: int = 1

    def serve(self, connection: Connection, index: int) -> None:
        sizes = {f"{n}/{s}": k for n in self.environments for s, k in (("train", TRAIN_TASKS), ("eval", EVAL_TASKS))}
        connection.send(Hello(role="environment", index=index, pid=self.pid, host="here", sizes=sizes))
        while not isinstance(message := connection.receive(TO_WORKER), Stop):
            match message:
                case RunGroup():
                    self._run(connection, message)
                case Demonstrate():
                    samples = tuple(demonstration(task.index) for task in message.tasks)
                    connection.send(Demonstrations(request=message.request, samples=samples))
                case KeepInFlight():
                    self._keep(connection, message)
                case Cancel():
                    self.cancelled.append(message.request)

    def _keep(self, connection: Connection, order: KeepInFlight) -> None:
        try:
            connection.send(InFlightKept(request=order.request, groups=self.keep(order)))
        except RuntimeError as error:
            connection.send(Failed(error=str(error), request=order.request))

    def _run(self, connection: Connection, request: RunGroup) -> None:
        self.asked.append(request)
        reply = self.reply(request)
        if isinstance(reply, Group):
            connection.send(GroupDone(request=request.request, group=reply))
        elif reply is not None:
            connection.send(attrs.evolve(reply, request=request.request))


@attrs.define(eq=False)
class FakeTrainer:
    """One rank; the loss it reports is the sum of the tokens it was given. `before_step` may wait, or raise."""

    before_step: Callable[[TrainStep], None] = lambda step: None
    before_saved: Callable[[Save], object] = lambda save: None
    """Called by a thread that writes its part of a checkpoint."""
    version: int = 0
    steps: list[TrainStep] = attrs.field(factory=list)
    retired: list[int] = attrs.field(factory=list)
    saved: list[Path] = attrs.field(factory=list)
    savers: list[threading.Thread] = attrs.field(factory=list)
    connect: Callable[[str], Connection] = attrs.field(init=False)

    def serve(self, connection: Connection, index: int, world_size: int) -> None:
        connection.send(
            Hello(role="trainer", index=index, pid=1, host="here", world_size=world_size, version=self.version)
        )
        while not isinstance(message := connection.receive(TO_WORKER), Stop):
            try:
                self._obey(connection, message, index)
            except RuntimeError as error:
                connection.send(Failed(error=str(error), fatal=True))
        for saver in self.savers:
            saver.join()

    def _save(self, order: Save, index: int, version: int) -> None:
        """Write a part of a checkpoint, a file that holds the version, and tell so over a connection of its own."""
        name = f"trainer/rank-{index}"
        path = Path(order.path, name)
        with closing(self.connect(f"trainer-{index}-checkpoints")) as connection:
            try:
                self.before_saved(order)
            except RuntimeError as error:
                connection.send(Failed(error=str(error), fatal=True))
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            files = {name: write_json(path, version)}
            connection.send(Saved(step=order.step, rank=index, files=files))

    def _obey(self, connection: Connection, message: Any, index: int) -> None:
        publishes = index == 0
        match message:
            case TrainStep():
                self.before_step(message)
                self.steps.append(message)
                self.version += 1
                connection.send(self._done(message, publishes=publishes and message.publish))
            case Publish():
                report = StepDone(step=self.version, version=self.version, sums={}, values={}, seconds={})
                connection.send(attrs.evolve(report, manifest=manifest(self.version) if publishes else None))
            case Retire():
                self.retired.append(message.version)
            case Save():
                self.saved.append(Path(message.path))
                self.savers.append(threading.Thread(target=self._save, args=(message, index, self.version)))
                self.savers[-1].start()

    def _done(self, order: TrainStep, *, publishes: bool) -> StepDone:
        (micro_batches,) = order.batch.ranks
        stream = "rl" if order.batch.phase == "rl" else "ce"
        return StepDone(
            step=order.batch.step,
            version=self.version,
            sums={f"loss/{stream}": float(sum(int(micro.tokens.sum()) for micro in micro_batches))},
            values={"grad_norm": 1.0, "learning_rate": order.learning_rate},
            seconds={"wait": 0.0},
            manifest=manifest(self.version) if publishes else None,
        )


@attrs.define(eq=False)
class FakeEngine:
    """An engine's client, in the controller's loop; `broken` names calls that fail, `held` those that wait."""

    prepared: list[int] = attrs.field(factory=list)
    committed: list[int] = attrs.field(factory=list)
    broken: set[str] = attrs.field(factory=set)
    held: dict[str, asyncio.Event] = attrs.field(factory=dict)
    calls: list[str] = attrs.field(factory=list)
    closed: bool = False

    async def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.held:
            await self.held[name].wait()
        if name in self.broken:
            raise InfrastructureError(f"{name} is broken")

    async def prepare(self, manifest: Manifest) -> None:
        await self._call("prepare")
        self.prepared.append(manifest.version)

    async def commit(self, version: int) -> None:
        await self._call("commit")
        self.committed.append(version)

    async def statistics(self) -> Mapping[str, float]:
        await self._call("statistics")
        return {"version": 0, "running": 0, "waiting": 0, "generated_tokens": 0, "busy_seconds": 0.0}

    async def generate(self, prompt: Sequence[int], sampling: Sampling, **options: Any) -> list[Any]:
        raise NotImplementedError

    async def pause(self) -> None:
        raise NotImplementedError

    async def resume(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        self.closed = True


@attrs.define(eq=False)
class FakeTracker:
    """Remembers what it was told; raises in the methods named by `broken`."""

    broken: set[str] = attrs.field(factory=set)
    lines: list[Mapping[str, Any]] = attrs.field(factory=list)
    trained: list[int] = attrs.field(factory=list)
    started: bool = False
    finished: list[BaseException | None] = attrs.field(factory=list)

    def _check(self, name: str) -> None:
        if name in self.broken:
            raise ValueError(f"no {name}")

    def start(self) -> None:
        self._check("start")
        self.started = True

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._check("log")
        self.lines.append(metrics)

    def groups(self, step: int, groups: Sequence[Group]) -> None:
        self._check("groups")
        self.trained += [group.group_id for group in groups]

    def finish(self, error: BaseException | None) -> None:
        self.finished.append(error)


# --- the composition --------------------------------------------------------------------------------------------------
RECORDS: dict[type, Provider] = {
    config.ModelConfig: Model(
        name="toy", config=config.ModelConfig, summary="", build="", weights="", render="", special_tokens=()
    ),
    config.EngineConfig: Engine(name="fake", config=config.EngineConfig, summary="", serve="", connect="connect"),
    config.EnvironmentConfig: Environment(name="toy", config=config.EnvironmentConfig, summary="", build=""),
    config.TrackerConfig: Tracker(name="fake", config=config.TrackerConfig, summary="", build="tracker"),
    BoundedStalenessConfig: prl_bounded_staleness.prl_schedulers()[0],
    GrpoConfig: prl_group_relative.prl_advantages()[0],
}


@attrs.define(eq=False)
class FakeHooks:
    """Lifecycle hooks of a run: what was called, and who fails."""

    calls: list[tuple[str, dict[str, Any]]] = attrs.field(factory=list)
    failing: set[str] = attrs.field(factory=set)

    def implementations(self, hook: str) -> list[tuple[str, Callable[..., None]]]:
        def record(**arguments: Any) -> None:
            self.calls.append((hook, arguments))
            if hook in self.failing:
                raise ValueError("a plugin's mistake")

        return [("watcher", record)]

    def named(self, hook: str) -> list[dict[str, Any]]:
        return [arguments for name, arguments in self.calls if name == hook]


@attrs.define(eq=False)
class FakeComposition:
    """What the controller asks of a composition."""

    run: Run
    hooks: FakeHooks
    engines: Sequence[FakeEngine]
    tracker: FakeTracker

    @property
    def resolved(self) -> dict[str, Any]:
        return {
            "model": {"type": "toy"},
            "tokenizer": {"file": "", "characters": self.run.tokenizer.characters},
            "optimizer": {"type": "toy"},
            "quantization": {"type": "toy"},
            "trainer": {"ranks": self.run.trainer.ranks},
        }

    def provider(self, section: Any) -> Provider:
        return RECORDS[type(section)]

    def load(self, ref: str) -> Callable[[str, str], FakeEngine]:
        assert ref == "connect"
        return lambda url, token: self.engines[int(url.rpartition("-")[2])]

    def build(self, section: Any, *arguments: Any) -> Any:
        if isinstance(section, BoundedStalenessConfig):
            from prl_bounded_staleness.scheduler import build

            return build(section, *arguments)
        if isinstance(section, GrpoConfig):
            from prl_group_relative.grpo import build as grpo

            return grpo(section)
        return self.tracker


def toy_run(
    *,
    steps: int = 3,
    max_staleness: int = 1,
    warmup: int = 0,
    rollouts: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    checkpoints: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    engines: int = 1,
) -> Run:
    """Two groups of four rollouts a step, unless told otherwise."""
    return Run(
        plugins=("toy",),
        run=config.RunSection(steps=steps, seed=3),
        model=config.ModelConfig(),
        tokenizer=config.TokenizerSection(characters="ab"),
        environments=(config.EnvironmentConfig(name="toy"),),
        rollouts=config.RolloutSection(**{"groups_per_step": 2, "group_size": 4, **(rollouts or {})}),
        scheduler=BoundedStalenessConfig(max_staleness=max_staleness),
        advantage=GrpoConfig(),
        losses=config.LossesSection(rl=config.LossConfig()),
        optimizer=config.OptimizerConfig(learning_rate=0.5),
        warmup=config.WarmupSection(steps=warmup, samples_per_step=5, learning_rate=0.25),
        trainer=config.TrainerSection(**{"micro_batch_tokens": 16, **(trainer or {})}),
        quantization=config.QuantizationConfig(),
        engine=config.EngineConfig(count=engines),
        weights=config.WeightTransportConfig(deadline=5.0),
        evaluation=config.EvaluationSection(**(evaluation or {})),
        checkpoints=config.CheckpointSection(**(checkpoints or {})),
        trackers=(config.TrackerConfig(),),
        launcher=config.LauncherConfig(),
    )


# --- the run ----------------------------------------------------------------------------------------------------------
@attrs.define(eq=False)
class FakeRun:
    """A run directory and everyone in it; `go` runs the controller to its end."""

    path: Path
    run: Run
    environments: list[FakeEnvironment] = attrs.field(factory=lambda: [FakeEnvironment()])
    trainers: list[FakeTrainer] = attrs.field(factory=lambda: [FakeTrainer()])
    engines: list[FakeEngine] = attrs.field(factory=lambda: [FakeEngine()])
    tracker: FakeTracker = attrs.field(factory=FakeTracker)
    hooks: FakeHooks = attrs.field(factory=FakeHooks)
    run_dir: RunDir = attrs.field(init=False)
    _loop: Any = None
    _task: Any = None

    def __attrs_post_init__(self) -> None:
        self.run_dir = RunDir(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.run_dir.create_token()
        for path in (self.run_dir.config, self.run_dir.lock):
            path.write_text("")

    def go(self) -> None:
        """To the end; raises what the controller raises."""
        with self._threads() as failures:
            asyncio.run(self._go())
        assert not failures

    def terminate(self) -> None:
        """End the controller as a signal would; may be called from a worker's thread."""
        self._loop.call_soon_threadsafe(self._task.cancel)

    async def _go(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        composition: Any = FakeComposition(self.run, self.hooks, self.engines, self.tracker)
        await Controller(composition, self.run_dir).run()

    @contextmanager
    def _threads(self) -> Iterator[list[BaseException]]:
        failures: list[BaseException] = []
        with ThreadPoolExecutor(max_workers=16) as pool:
            jobs = [pool.submit(self._work, "environment", i, e.serve) for i, e in enumerate(self.environments)]
            ranks = len(self.trainers)
            for i, trainer in enumerate(self.trainers):
                trainer.connect = lambda identity: Connection(self.run_dir, identity, timeout=20.0)
                jobs.append(pool.submit(self._work, "trainer", i, lambda c, n, t=trainer: t.serve(c, n, ranks)))
            jobs += [pool.submit(self._work, "engine", i, self._engine) for i in range(len(self.engines))]
            yield failures
            failures += [error for job in jobs if (error := job.exception(timeout=20)) is not None]

    def _engine(self, connection: Connection, index: int) -> None:
        connection.send(Hello(role="engine", index=index, pid=1, host="here", url=f"engine-{index}"))
        while not isinstance(connection.receive(TO_WORKER), Stop):
            pass

    def _work(self, role: str, index: int, serve: Callable[[Connection, int], None]) -> None:
        connection = Connection(self.run_dir, f"{role}-{index}", timeout=20.0)
        try:
            serve(connection, index)
        finally:
            connection.close()

    # --- what was written ---------------------------------------------------------------------------------------------
    def lines(self, phase: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl of a phase."""
        return [line for line in _json_lines(self.run_dir.metrics) if line["phase"] == phase]

    def trained(self) -> list[dict[str, Any]]:
        """Lines of rollouts.jsonl."""
        return _json_lines(self.run_dir.rollouts)

    def trained_groups(self) -> list[int]:
        """Ids of the groups that were trained, in order."""
        return [row["group_id"] for row in self.trained() if row["member"] == "0"]

    def until(self, ready: Callable[[dict[str, Any]], bool]) -> None:
        """Wait, in a worker's thread, until state.json says so; it is replaced as a whole."""
        pause = threading.Event()
        deadline = time.monotonic() + 20
        while not ready(self.state):
            assert time.monotonic() < deadline, self.state
            pause.wait(0.01)

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = read_json(self.run_dir.state)
        return state


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
