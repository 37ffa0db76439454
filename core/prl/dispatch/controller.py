"""The controller of a run: one process, one event loop, no torch.

                  ┌──────────── cut, lost, stale: tried again ────────────┐
                  ▼                                                       │
    feed ──► dispatch ──► rollouts in flight ──► admit ──► ready ──► form ──► batches ──► train ──► reports ──► write
                ▲    (environment workers, engines)                                         │
                └──────── served ◄── publish (one keeper per engine) ◄── manifest ◄─────────┘

Each loop, what it waits for, and who unblocks it:

    serve       a message                          any worker: answers requests, fills the trainer's inbox
    dispatch    capacity (the scheduler's word)    a group that ends, a batch that is formed, a version that is served
    arrivals    one task per group in flight:      its environment worker, its deadline, or a cut; then room in `ready`
    form        room in `batches`, then            train takes the batch before
                enough ready groups                arrivals
    train       a batch, then the trainer          form (or warm-up); every trainer rank
    publish     a manifest newer than its engine   train; or an eviction
    evaluate    a request, then its version        train; publish
    write       a report                           train, evaluate
    trackers    a line                             write
    state       something new, twice a second      write, and every change of status
    engines     a poll, once per step, or a time   write; a group that an engine failed; a scheduler that watches
    checkpoints a cut, then every rank's part      train; trainer ranks
    sweep       a step                             train
    stop        the stop file                      `prl stop`, the launcher
    casualties  a line of failures.jsonl           whoever supervises the processes
    ledger      a fact                             every other loop

Every queue is bounded: a slow disk holds up reports, full reports hold up training, training holds up forming, unformed
groups hold up dispatch, and dispatch is where the run breathes in. Facts that the ledger has yet to write hold up
dispatch and training. Trackers hold up nothing: they miss lines instead.

All loops live in one TaskGroup: the first that fails ends the others, the workers are told to stop, and its error is
the run's. An engine or environment worker that dies is replaced meanwhile; without its trainer the run goes on in
another process than this one (`prl.supervise`). A run goes through start (everyone says Hello, engines load the first
weights), warm-up, evaluation, the rl phase, and a last evaluation; a stop file ends it after the running step, with a
checkpoint.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from prl import network
from prl.columns import ColumnFolder
from prl.compose.compose import Composition
from prl.dispatch.batches import PreparedBatch
from prl.dispatch.buffer import BoundedQueue
from prl.dispatch.casualties import Casualties
from prl.dispatch.events import LifecycleHooks, Trackers
from prl.dispatch.hub import DisconnectedError, Hub
from prl.dispatch.parts import Assembly, Parts, local_runner, restored, roll_call
from prl.dispatch.progress import Progress
from prl.dispatch.record import Record, StateFile
from prl.dispatch.reporting import Reporter
from prl.dispatch.training import TrainingLoop
from prl.errors import PrlError
from prl.ledger import facts
from prl.ledger.event_log import EventLog
from prl.ledger.writer import Ledger
from prl.messages import Hello, Stop
from prl.providers import EngineLoad, LoadAwareScheduler, RunInfo
from prl.run_dir import RunDir

log = logging.getLogger(__name__)

_STOP_POLL_SECONDS = 0.25
_SWITCH_SECONDS = 0.001  # threads that pack, write or measure hand the interpreter back to the event loop sooner

T = TypeVar("T")
Batches = BoundedQueue[PreparedBatch]


def main(composition: Composition, run_dir: RunDir) -> int:
    """Run to the end; the exit code. A foreseen failure is one sentence on standard error and in state.json."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.freeze()  # what is imported by now is never collected, and would make every full collection twice as long
    try:
        asyncio.run(Controller(composition, run_dir).run())
    except PrlError as error:
        print(f"prl: {error}", file=sys.stderr)
        return error.exit_code
    return 0


class Controller:
    """One run, from the first Hello to the last Stop."""

    def __init__(self, composition: Composition, run_dir: RunDir) -> None:
        run = composition.run
        steps = run.warmup.steps + run.run.steps
        self._composition = composition
        self._run_dir = run_dir
        self._stopping = asyncio.Event()
        self._progress = Progress(steps=steps)
        self._state = StateFile(run_dir, steps=steps)
        self._hooks = LifecycleHooks(composition.hooks.implementations)
        self._trackers = Trackers(
            [(composition.provider(s).name, composition.build(s, run, run_dir.path)) for s in run.trackers]
        )
        self._record = Record(run_dir)
        log_kind = run.run.event_log
        self._ledger = Ledger(run_dir.ledger, None if log_kind == "off" else EventLog(run_dir, log_kind))
        self._reporter = Reporter(
            record=self._record,
            state=self._state,
            hooks=self._hooks,
            trackers=self._trackers,
            progress=self._progress,
            keep_rollouts=run.rollouts.keep,
            gauges=self._gauges,
        )
        self._batches = Batches("batches", 1)
        self._parts: Parts | None = None
        self._publish_seconds: float | None = None

    async def run(self) -> None:
        """Returns when the run reached its end or was stopped; raises what it failed of."""
        try:
            await self._trackers.start()
            async with AsyncExitStack() as resources:
                await self._live(resources)
        except BaseException as raised:
            error = root_cause(raised)
            await self._end("failed", error)
            raise error from None
        await self._end("stopped" if self._stopping.is_set() else "finished", None)

    async def _live(self, resources: AsyncExitStack) -> None:
        """Every loop, while the phases go by."""
        resources.callback(ColumnFolder(self._run_dir.columns).clear)
        hub = await resources.enter_async_context(Hub(self._run_dir, network.address(self._composition.run)))
        resources.push_async_callback(dismiss, hub)
        async with asyncio.TaskGroup() as loops:
            casualties = Casualties(self._run_dir, hub, self._ledger)
            watching = loops.create_task(casualties.run())
            started = (hub.serve(), self._state.run(), self._watch_stop(), self._ledger.run())
            background = [loops.create_task(loop) for loop in started]
            writer = loops.create_task(self._reporter.run())
            telling = loops.create_task(self._trackers.run())
            parts = await self._unless_stopped(self._start(hub, casualties, resources))
            if parts is not None:
                loops_of_parts = (parts.publisher, parts.checkpoints, parts.sweep)
                background += [loops.create_task(part.run()) for part in loops_of_parts]
                background.append(loops.create_task(self._watch_engines(parts)))
                await self._phases(parts)
            self._reporter.queue.close()
            await writer
            self._trackers.close()
            await telling
            watching.cancel()
            await casualties.look()
            await self._ledger.settled()
            for loop in background:
                loop.cancel()

    async def _end(self, status: str, error: BaseException | None) -> None:
        """The last word, to the state file, the plugins and the trackers."""
        sentence = "terminated by a signal" if isinstance(error, asyncio.CancelledError) else str(error or "")
        trained = self._progress.trained  # a report may still be on its way when the run fails
        self._state.update(status=status, error=sentence, step=trained, version=trained, engines=[])
        self._state.write()
        self._hooks.call("prl_run_end", info=self._info(), error=error)
        await self._trackers.finish(error)
        await self._ledger.close(status=status, error=sentence)
        self._record.close()

    # --- phases -------------------------------------------------------------------------------------------------------
    async def _start(self, hub: Hub, casualties: Casualties, resources: AsyncExitStack) -> Parts:
        """Everyone says Hello, and engines load the weights the trainer starts from."""
        runner = local_runner(self._composition, self._run_dir)
        if runner is not None:
            resources.push_async_callback(runner.aclose)
        parts = self._parts = Assembly(
            composition=self._composition,
            run_dir=self._run_dir,
            hub=hub,
            workers=await roll_call(hub, self._composition),
            runner=runner,
            restored=await restored(self._composition, self._run_dir),
            reporter=self._reporter,
            ledger=self._ledger,
            on_served=self._served,
        ).build()
        resources.push_async_callback(parts.engines.aclose)
        casualties.survivors, hub.on_return = parts.survivors, self._returned
        self._hooks.call("prl_run_start", info=self._info())
        manifest = await parts.trainer.publish()
        self._ledger.record(facts.Loaded(manifest))
        await parts.publisher.first(manifest)
        return parts

    async def _phases(self, parts: Parts) -> None:
        """Warm-up, rl, and the evaluations around it; each ends early when the run is asked to stop."""
        self._state.update(
            status="running",
            step=self._progress.trained,
            version=self._progress.trained,
            engines=[engine.url for engine in parts.engines.engines],
        )
        run, training = self._composition.run, self._training(parts)
        await self._train(training, parts.warmup.form)
        if parts.evaluator.due(self._progress.trained):
            await self._evaluate(parts)
        await self._train(training, parts.former.form, parts.dispatcher.run(), parts.evaluator.run())
        if self._progress.trained > parts.checkpoints.newest:
            await parts.checkpoints.begin()
        if run.run.steps:
            await self._evaluate(parts)
        await parts.checkpoints.settled()

    async def _train(
        self,
        training: TrainingLoop,
        form: Callable[[Batches], Coroutine[Any, Any, None]],
        *beside: Coroutine[Any, Any, None],
    ) -> None:
        """A phase of training on the batches that `form` makes, with the loops beside it, until its end is served."""
        self._batches = Batches("batches", 1)
        async with asyncio.TaskGroup() as phase:
            loops = [form(self._batches), self._close_when_stopping(self._batches), *beside]
            helpers = [phase.create_task(loop) for loop in loops]
            await training.train(self._batches)
            await self._unless_stopped(self._progress.until_served(self._progress.trained))
            await self._unless_stopped(training.evaluator.idle())
            if self._stopping.is_set() and self._progress.trained > training.checkpoints.newest:
                await training.checkpoints.begin()  # what is in flight ends with the helpers
                await training.checkpoints.kept()
            for helper in helpers:
                helper.cancel()

    def _training(self, parts: Parts) -> TrainingLoop:
        return TrainingLoop(
            run=self._composition.run,
            trainer=parts.trainer,
            publisher=parts.publisher,
            engines=parts.engines,
            reporter=self._reporter,
            checkpoints=parts.checkpoints,
            evaluator=parts.evaluator,
            progress=self._progress,
            ledger=self._ledger,
            stopping=self._stopping,
        )

    async def _evaluate(self, parts: Parts) -> None:
        """With the weights the trainer holds, unless that is done; nothing is trained meanwhile."""
        if parts.evaluator.wanted and parts.evaluator.newest < self._progress.trained:
            await self._unless_stopped(parts.evaluator.evaluate(self._progress.trained))

    # --- stopping -----------------------------------------------------------------------------------------------------
    async def _watch_stop(self) -> None:
        while not await asyncio.to_thread(self._run_dir.stop.exists):
            await asyncio.sleep(_STOP_POLL_SECONDS)
        self._stopping.set()
        self._state.update(status="stopping")

    async def _close_when_stopping(self, batches: Batches) -> None:
        await self._stopping.wait()
        batches.close()

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Do it, or give it up as soon as the run is asked to stop: None then."""
        if self._stopping.is_set():
            work.close()
            return None
        async with asyncio.TaskGroup() as race:
            worker = race.create_task(work)
            stopper = race.create_task(self._stopping.wait())
            await asyncio.wait((worker, stopper), return_when=asyncio.FIRST_COMPLETED)
            worker.cancel()
            stopper.cancel()
        return None if worker.cancelled() else worker.result()

    # --- what other loops ask for -------------------------------------------------------------------------------------
    def _returned(self, peer: bytes, hello: Hello) -> None:
        assert self._parts is not None, "nobody is told before the parts are there"
        self._parts.survivors.welcome(peer, hello)
        self._state.update(engines=[engine.url for engine in self._parts.engines.engines])

    def _served(self, version: int, seconds: float) -> None:
        self._publish_seconds = seconds
        self._progress.served = version
        self._progress.change.notify()
        if self._parts is not None:
            self._parts.dispatcher.published(version)
        self._ledger.record(facts.Served(version=version, seconds=seconds))
        self._hooks.call("prl_weights_published", version=version, seconds=seconds)

    async def _watch_engines(self, parts: Parts) -> None:
        """And tell the scheduler how they do, where it wants to know."""
        scheduler = parts.dispatcher.scheduler
        if not isinstance(scheduler, LoadAwareScheduler):
            return await parts.engines.watch()

        def tell(loads: list[EngineLoad]) -> None:
            at = time.monotonic()
            self._ledger.record(facts.Loads(at=at, loads=tuple(loads)))
            parts.dispatcher.observed(at, loads)

        parts.engines.poll()
        return await parts.engines.watch(tell, every=scheduler.poll_seconds)

    def _gauges(self) -> dict[str, float]:
        """What the loops beside the trainer's can say about themselves now."""
        queues = [self._batches.statistics(), self._reporter.queue.statistics(), self._trackers.statistics()]
        gauges: dict[str, float] = {}
        if self._parts is not None:
            dispatcher, idle = self._parts.dispatcher, self._parts.engines.idle
            queues.append(dispatcher.buffer.statistics())
            gauges |= {f"dropped/{reason}": count for reason, count in dispatcher.take_dropped().items()}
            gauges |= {"queue/retry": len(dispatcher.feed.waiting), "queue/running": dispatcher.running}
            gauges |= {} if idle is None else {"idle/engine": idle}
            scheduler = dispatcher.scheduler
            gauges |= scheduler.gauges() if isinstance(scheduler, LoadAwareScheduler) else {}
        if self._publish_seconds is not None:
            gauges["time/publish"] = self._publish_seconds
        return {**gauges, **{f"queue/{queue.name}": queue.waiting for queue in queues}}

    def _info(self) -> RunInfo:
        return RunInfo(run=self._composition.run, run_dir=self._run_dir.path)


async def dismiss(hub: Hub) -> None:
    """Tell every worker that the run is over."""
    for peer in hub.peers:
        try:
            await hub.send(peer, Stop())
        except DisconnectedError as error:
            log.info("%s", error)


def root_cause(error: BaseException) -> BaseException:
    """The error that ended a run, out of the groups it came in; a foreseen one where there are several."""
    leaves = list(_leaves(error))
    return next((leaf for leaf in leaves if isinstance(leaf, PrlError)), leaves[0])


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
