"""Who takes part in a run, and what the controller is made of once they are there.

`roll_call` waits until every process of the plan has said Hello; `assemble` builds the controller's parts around them.
Called by the controller, once. Knows how parts fit together, nothing of when they run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs

from prl.columns import ColumnFolder
from prl.compose.compose import Composition
from prl.compose.origin import identity
from prl.compose.routing import replayed
from prl.dispatch import checkpoint
from prl.dispatch.batches import BatchFormer
from prl.dispatch.casualties import Survivors
from prl.dispatch.checkpoint import Checkpoints, ControllerState, Restored
from prl.dispatch.dispatcher import Dispatcher
from prl.dispatch.engines import Engine, EnginePool
from prl.dispatch.environments import EnvironmentPool, Place, RemoteRunner
from prl.dispatch.evaluation import EvaluationOutcome, Evaluator
from prl.dispatch.feed import Feed, Source
from prl.dispatch.hub import Hub
from prl.dispatch.permutation import mix
from prl.dispatch.placement import Placement
from prl.dispatch.progress import Progress
from prl.dispatch.reporting import Reporter
from prl.dispatch.sweep import ColumnSweep
from prl.dispatch.trainer import Trainer
from prl.dispatch.warmup import WarmupBatches
from prl.errors import CheckpointError, RunError
from prl.ledger import facts
from prl.ledger.writer import Ledger
from prl.messages import Hello, Role, RunGroup
from prl.providers import Engine as EngineProvider
from prl.providers import EngineClient, RolloutScheduler
from prl.rollout.runner import GroupRunner, environment_names
from prl.run_dir import RunDir
from prl.score.credit_state import CreditState
from prl.supervise.casualties import condemn
from prl.types import TaskRef
from prl.weights.publish import Publisher

_STARTUP_SECONDS = 1800.0  # large engines load and compile for many minutes


# --- who is there -----------------------------------------------------------------------------------------------------
def expected_workers(composition: Composition) -> dict[Role, int]:
    """How many workers of each role will say Hello."""
    run = composition.run
    remote = environment_names(composition, cheap=False)
    return {
        "engine": run.engine.count,
        "environment": run.rollouts.workers if remote else 0,
        "trainer": run.trainer.ranks,
    }


async def roll_call(hub: Hub, composition: Composition) -> dict[Role, list[tuple[bytes, Hello]]]:
    """Every worker's connection and Hello, by index; RunError names who is missing after half an hour."""
    expected = expected_workers(composition)
    try:
        async with asyncio.timeout(_STARTUP_SECONDS):
            for role, n in expected.items():
                for index in range(n):
                    await hub.hello(role, index)
            return {role: [await hub.hello(role, index) for index in range(n)] for role, n in expected.items()}
    except TimeoutError:
        absent = [f"{r}-{i}" for r, n in expected.items() for i in range(n) if (r, i) not in hub.present]
        raise RunError(
            f"not ready after {_STARTUP_SECONDS:.0f} s: {', '.join(absent)}; `prl logs` shows what they do"
        ) from None


async def restored(composition: Composition, run_dir: RunDir) -> Restored | None:
    """What the run continues from, verified; None for a fresh start. CheckpointError says what is wrong with it.

    Its columns may be gigabytes, which are read beside the event loop.
    """
    if not composition.run.checkpoints.resume:
        return None
    path = Path(composition.run.checkpoints.resume)
    found = await asyncio.to_thread(checkpoint.read, path)
    await asyncio.to_thread(checkpoint.restore_columns, path, ColumnFolder(run_dir.columns))
    return found


def local_runner(composition: Composition, run_dir: RunDir) -> GroupRunner | None:
    """The cheap environments, built in this process; None when there is none."""
    names = environment_names(composition, cheap=True)
    if not names:
        return None
    return GroupRunner(composition, composition.run, run_dir.token(), columns=run_dir.columns, environments=names)


# --- what the controller is made of -----------------------------------------------------------------------------------
@attrs.frozen(kw_only=True, eq=False)
class Parts:
    """The controller's parts, ready to run."""

    progress: Progress
    engines: EnginePool
    trainer: Trainer
    publisher: Publisher
    dispatcher: Dispatcher
    former: BatchFormer
    warmup: WarmupBatches
    evaluator: Evaluator
    checkpoints: Checkpoints
    sweep: ColumnSweep
    survivors: Survivors


@attrs.frozen(kw_only=True, eq=False)
class Assembly:
    """Builds the parts of one run; `on_served` is told (version, seconds) when engines serve new weights."""

    composition: Composition
    run_dir: RunDir
    hub: Hub
    workers: Mapping[Role, Sequence[tuple[bytes, Hello]]]
    runner: GroupRunner | None
    reporter: Reporter
    ledger: Ledger
    restored: Restored | None
    """The controller's part of the checkpoint that the run continues from."""
    on_served: Callable[[int, float], None]

    def build(self) -> Parts:
        """CheckpointError when the run resumes from what does not belong to it."""
        run, progress = self.composition.run, self.reporter.progress
        engines = EnginePool(list(self._engines()), progress.change, self.ledger)
        environments = EnvironmentPool(self._places(), on_run=self._placed(engines))
        placement = Placement(engines, environments, timeout=run.rollouts.timeout)
        trainer = Trainer(self.hub, [peer for peer, _ in self.workers["trainer"]])
        scheduler = self.composition.build(run.scheduler, run.rollouts.groups_per_step, time.monotonic)
        state = self._state(progress, scheduler, self.restored)
        dispatcher = self._dispatcher(state, placement, engines)
        if self.restored is not None:
            dispatcher.restore(self.restored.groups, self.restored.in_flight)
        return Parts(
            progress=progress,
            engines=engines,
            trainer=trainer,
            publisher=self._publisher(engines, trainer),
            dispatcher=dispatcher,
            former=BatchFormer(
                run=run,
                dispatcher=dispatcher,
                credit=state.credit,
                progress=progress,
                ledger=self.ledger,
            ),
            warmup=WarmupBatches(
                run=run,
                feed=state.demonstrations,
                environments=environments,
                progress=progress,
                ledger=self.ledger,
            ),
            evaluator=self._evaluator(placement),
            checkpoints=self._checkpoints(trainer, state, dispatcher, environments),
            sweep=ColumnSweep(folder=ColumnFolder(self.run_dir.columns), feed=state.feed, progress=progress),
            survivors=Survivors(
                engines=engines,
                environments=environments,
                connect=self._connect,
                place=self._place,
                sizes=self._sizes(),
            ),
        )

    # --- engines and environments ----------------------------------------------------------------------------------
    def _engines(self) -> Iterator[Engine]:
        for index, (_, hello) in enumerate(self.workers["engine"]):
            kind = self.composition.run.engine.kind_of(index)
            yield Engine(index=index, url=hello.url, client=self._connect(hello.url), kind=kind)

    def _connect(self, url: str) -> EngineClient:
        provider = self.composition.provider(self.composition.run.engine)
        assert isinstance(provider, EngineProvider)
        client: EngineClient = self.composition.load(provider.connect)(url, self.run_dir.token())
        return client

    def _places(self) -> Iterator[Place]:
        if self.runner is not None:
            yield Place(name="controller", runner=self.runner, environments=_names(self.runner.sizes()))
        for peer, hello in self.workers["environment"]:
            yield self._place(peer, hello)

    def _place(self, peer: bytes, hello: Hello) -> Place:
        runner = RemoteRunner(self.hub, peer, lambda: self.reporter.progress.trained, replayed(self.composition))
        return Place(name=peer.decode(), runner=runner, environments=_names(hello.sizes))

    def _placed(self, engines: EnginePool) -> Callable[[RunGroup, str], None]:
        def record(request: RunGroup, worker: str) -> None:
            if request.task.split == "train":
                fact = facts.Placed(
                    group_id=request.group_id,
                    engine=next(engine.index for engine in engines.engines if engine.url == request.engine),
                    worker=worker,
                    version=request.version,
                )
                self.ledger.record(fact)

        return record

    def _sizes(self) -> dict[str, int]:
        """`{"<environment>/<split>": tasks}`; RunError when two workers see an environment differently."""
        sizes: dict[str, int] = dict(self.runner.sizes()) if self.runner is not None else {}
        for peer, hello in self.workers["environment"]:
            for name, size in hello.sizes.items():
                if sizes.setdefault(name, size) != size:
                    raise RunError(
                        f"{peer.decode()} has {size} tasks in {name}, another worker has {sizes[name]}; "
                        "environments must be the same in every process"
                    )
        return sizes

    # --- tasks and groups ---------------------------------------------------------------------------------------------
    def _state(self, progress: Progress, scheduler: RolloutScheduler, restored: Restored | None) -> ControllerState:
        sizes = {name.rpartition("/")[0]: size for name, size in self._sizes().items() if name.endswith("/train")}
        state = controller_state(self.composition, progress, scheduler, sizes)
        if restored is not None:
            state.load_state_dict(restored.state)
        for peer, hello in self.workers["trainer"]:
            if hello.version != progress.trained:
                raise CheckpointError(
                    f"{peer.decode()} starts from version {hello.version}, the controller from version "
                    f"{progress.trained}; resume with one checkpoint that is complete"
                )
        self.ledger.record(self._continued(state, restored.chain if restored else ""))
        return state

    def _continued(self, state: ControllerState, chain: str) -> facts.Continued:
        run = self.composition.run
        return facts.Continued(
            step=state.progress.trained,
            source=run.checkpoints.resume,
            chain=chain,
            max_staleness=getattr(run.scheduler, "max_staleness", None),
            groups_per_step=run.rollouts.groups_per_step,
            group_size=run.rollouts.group_size,
            samples_per_step=run.warmup.samples_per_step,
            feeds={"rl": state.feed.state_dict(), "warmup": state.demonstrations.state_dict()},
            state=state.state_dict(),
        )

    def _dispatcher(self, state: ControllerState, placement: Placement, engines: EnginePool) -> Dispatcher:
        run, hooks = self.composition.run, self.reporter.hooks
        return Dispatcher(
            feed=state.feed,
            scheduler=state.scheduler,
            placement=placement,
            engines=engines,
            progress=state.progress,
            ledger=self.ledger,
            rollouts=run.rollouts,
            most_lost=run.failures.share,
            seed=run.run.seed,
            clock=time.monotonic,
            on_group=lambda group, version: hooks.call("prl_group_done", group=group, version=version),
        )

    # --- what follows a step ------------------------------------------------------------------------------------------
    def _publisher(self, engines: EnginePool, trainer: Trainer) -> Publisher:
        return Publisher(
            engines,
            change=self.reporter.progress.change,
            patience=self.composition.run.weights.patience,
            on_served=self.on_served,
            retire=trainer.retire,
            condemn=lambda engine, reason: condemn(self.run_dir, f"engine-{engine}", reason),
        )

    def _evaluator(self, placement: Placement) -> Evaluator:
        run, sizes = self.composition.run, self._sizes()

        async def report(outcome: EvaluationOutcome) -> None:
            await self.reporter.queue.put(outcome)

        tasks = [
            TaskRef(environment=section.name, split="eval", index=index)
            for section in run.environments
            for index in range(min(run.evaluation.tasks, sizes[f"{section.name}/eval"]))
        ]
        return Evaluator(
            run=run,
            tasks=tasks,
            placement=placement,
            progress=self.reporter.progress,
            ledger=self.ledger,
            report=report,
        )

    def _checkpoints(
        self, trainer: Trainer, state: ControllerState, dispatcher: Dispatcher, environments: EnvironmentPool
    ) -> Checkpoints:
        hooks = self.reporter.hooks
        return Checkpoints(
            folder=self.run_dir.checkpoints,
            section=self.composition.run.checkpoints,
            identity=identity(self.composition),
            trainer=trainer,
            state=state,
            pending=dispatcher.pending,
            columns=ColumnFolder(self.run_dir.columns),
            keep_in_flight=environments.keep_in_flight,
            ledger=self.ledger,
            on_saved=lambda step, path: hooks.call("prl_checkpoint_saved", step=step, path=path),
            newest=state.progress.trained,
        )


def controller_state(
    composition: Composition, progress: Progress, scheduler: RolloutScheduler, sizes: Mapping[str, int]
) -> ControllerState:
    """As it is before the first step; `sizes` are the tasks of each environment's train split."""
    run = composition.run

    def feed(salt: int, retries: int) -> Feed:
        sources = [
            Source(environment=section.name, weight=section.weight, size=sizes[section.name])
            for section in run.environments
        ]
        return Feed(sources, seed=mix(run.run.seed, salt), retries=retries)

    return ControllerState(
        progress=progress,
        feed=feed(0, run.rollouts.retries),
        demonstrations=feed(1, 0),
        scheduler=scheduler,
        credit=CreditState(composition.build(run.advantage)),
    )


def _names(sizes: Mapping[str, int]) -> frozenset[str]:
    """Environments of `{"<environment>/<split>": tasks}`."""
    return frozenset(name.rpartition("/")[0] for name in sizes)
