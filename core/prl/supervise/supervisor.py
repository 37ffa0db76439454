"""A run from its first process to the end of its last, through as many attempts as it takes.

    start all ─► wait ──► controller ends well             its exit code is the run's
                  ▲  │    Ctrl-C, SIGTERM                  once: ask the controller to stop; twice: end everything now
                  │  ├──► engine, environment worker dies  started again, alone; the controller reads of it and goes on
                  │  │    one is silent, or condemned      killed, hence as above
                  │  └──► trainer or controller dies       everything is killed, and ...
                  └────── next attempt ◄── resume ◄────────┘  as `prl resume` does it, from the newest checkpoint

What is tried again, and how often, is `prl.supervise.policy`'s to say. Whatever ends the run leaves its sentence in
state.json and no process. Called by launchers, in the main thread of `prl launch` and `prl resume`.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs

from prl.compose.plan import LaunchPlan, Process, plan
from prl.compose.resume import resume
from prl.errors import InfrastructureError, LockError, PrlError, RunError
from prl.run_dir import RunDir, read_json
from prl.supervise import casualties
from prl.supervise.beats import CONTROLLER_LOOP, Pulse
from prl.supervise.casualties import Casualty
from prl.supervise.children import Child, Children, Spawn
from prl.supervise.excerpt import excerpt
from prl.supervise.policy import SIGNALLED, UNFORESEEN, RestartBudget, how_it_ended, is_accident

INTERRUPTED = 130
RESTARTED_ALONE = frozenset({"engine", "engine-part", "environment"})
_TICK = 0.25  # seconds between two looks at signs of life


def supervise(
    launched: LaunchPlan, spawn: Spawn, *, grace: float, trainer_nodes: Callable[[], int | None] = lambda: None
) -> int:
    """Run the processes of the plan to the end of the run; its exit code.

    `grace`: seconds that processes have to end by themselves, and again after SIGTERM. `trainer_nodes`: how many nodes
    there are for the trainer, asked before an attempt that follows another; None: as many as it wants.
    """
    children = Children(launched.run_dir, spawn, grace=grace)
    supervisor = Supervisor(launched, children, trainer_nodes=trainer_nodes)
    with _signals(children):
        try:
            return supervisor.run()
        finally:
            children.end()


@contextmanager
def _signals(children: Children) -> Iterator[None]:
    """SIGINT and SIGTERM become events for as long as this lasts."""
    handlers = {
        number: signal.signal(number, lambda received, _: children.signalled(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@attrs.frozen
class Broken:
    """The attempt cannot go on without this child; what became of it, as a sentence."""

    child: Child
    sentence: str


class Supervisor:
    """Decides; `Children` does."""

    def __init__(
        self,
        launched: LaunchPlan,
        children: Children,
        *,
        trainer_nodes: Callable[[], int | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = launched
        self._run_dir: RunDir = launched.run_dir
        self._children = children
        self._trainer_nodes = trainer_nodes
        self._clock = clock
        self._budget = RestartBudget(launched.failures)
        self._pulse = Pulse(self._run_dir, clock=clock)
        self._due: dict[str, tuple[float, Process]] = {}
        """Name of a process that waits to be started again -> when, and what."""
        self._given_up: set[str] = set()
        self._interrupts = 0
        self._furthest = 0
        self._under_way = False

    def run(self) -> int:
        """Attempt after attempt; the exit code of the run."""
        while True:
            self._start(*self._plan.processes)
            ended = self._watch()
            following = self._next(ended) if isinstance(ended, Broken) else ended
            if isinstance(following, int):
                return following
            self._plan = following

    def _start(self, *processes: Process) -> None:
        for process in processes:
            self._pulse.expect(process.name)
        self._children.start(*processes)

    # --- an attempt ---------------------------------------------------------------------------------------------------
    def _watch(self) -> int | Broken:
        """Until the run is over, with its exit code, or the attempt broken."""
        while True:
            event = self._children.event(_TICK)
            self._look_at_state()
            ended: int | Broken | None = None
            if isinstance(event, int):
                ended = self._interrupted()
            elif event is not None:
                ended = self._ended(event)
            if ended is not None:
                return ended
            self._start_what_is_due()
            self._kill_what_is_lost()

    def _look_at_state(self) -> None:
        state = read_json(self._run_dir.state) or {}
        self._furthest = max(self._furthest, state.get("step", 0))
        self._under_way = self._under_way or state.get("status") == "running"

    def _ended(self, child: Child) -> int | Broken | None:
        """None: the attempt goes on."""
        role, code = child.process.role, child.code
        if code == 0:
            return self._finish() if role == "controller" else None
        if not child.killed_because and not is_accident(code, under_way=self._under_way):
            return self._fail(child, _sentence(child))
        if role in RESTARTED_ALONE:
            return self._replace(child)
        if self._run_dir.stop.exists():
            return self._fail(child, f"{_sentence(child)} while the run was asked to stop")
        return Broken(child, _sentence(child))

    def _replace(self, child: Child) -> int | None:
        sentence = _sentence(child)
        pause = self._budget.spend(child.name, self._furthest)
        if pause is not None:
            self._due[child.name] = (self._clock() + pause, child.process)
            self._note(child, sentence, "started again" + (f" after {pause:.0f} s" if pause else ""))
            return None
        if not self._can_do_without(child.process):
            return self._fail(child, f"{sentence}; {self._budget.exhausted(child.name)}")
        self._given_up.add(child.name)
        self._note(child, sentence, f"{self._budget.exhausted(child.name)}; the run goes on without it")
        return None

    def _can_do_without(self, process: Process) -> bool:
        """Whether enough others of its role are left; a run that has not begun needs everyone to begin."""
        same = [other.name for other in self._plan.processes if other.role == process.role]
        left = len(set(same) - self._given_up - {process.name})
        least = self._plan.failures.minimum_engines if process.role == "engine" else 1
        return self._under_way and left >= least

    def _start_what_is_due(self) -> None:
        for name, (when, process) in list(self._due.items()):
            if self._clock() >= when:
                del self._due[name]
                self._start(process)

    def _kill_what_is_lost(self) -> None:
        """What is silent for too long, or was condemned by the controller; its end is an event as any other's."""
        inside = {
            "trainer": self._pulse.names("trainer-rank-"),
            "controller": self._pulse.names(CONTROLLER_LOOP),
        }
        for child in self._children.living:
            if not child.killed_because:
                own = [child.name, *inside.get(child.process.role, ())]
                child.killed_because = self._silence(own) or casualties.condemned(self._run_dir, child.name)
                if child.killed_because:
                    child.handle.kill()

    def _silence(self, names: list[str]) -> str:
        limit = self._plan.failures.silence
        silent = [name for name in names if limit and self._pulse.silent(name) > limit]
        return f"{silent[0]} gave no sign of life for {limit:g} s" if silent else ""

    # --- the next attempt ---------------------------------------------------------------------------------------------
    def _next(self, broken: Broken) -> LaunchPlan | int:
        """Kill what is left, wait as the policy says, and make the run ready to go on from its newest checkpoint."""
        child, sentence = broken.child, broken.sentence
        pause = self._budget.spend(child.name, self._furthest)
        if pause is None:
            return self._fail(child, f"{sentence}; {self._budget.exhausted(child.name)}")
        pid = self._pulse.pid(child.name)
        self._write_state("restarting", sentence)
        self._children.vacate()
        self._due.clear()
        self._given_up.clear()
        if self._paused(pause):
            self._write_state(
                "stopped", f"interrupted between two attempts, the first of which ended because {sentence}"
            )
            return INTERRUPTED
        try:
            attempt = resume(self._run_dir, trainer_nodes=self._trainer_nodes())
        except PrlError as error:
            self._write_state("failed", f"{sentence}; the run cannot go on by itself: {error}")
            _tell(f"the run failed: {sentence}; it cannot go on by itself: {error}")
            return RunError.exit_code
        self._note(child, sentence, f"attempt {attempt.number} goes on from {attempt.start}", pid=pid)
        return plan(attempt.composition, self._run_dir)

    def _paused(self, seconds: float) -> bool:
        """Wait; True when a signal came. Nothing lives then that could stop in an orderly way."""
        until = self._clock() + seconds
        while (left := until - self._clock()) > 0:
            if isinstance(self._children.event(left), int):
                return True
        return False

    # --- the end of the run -------------------------------------------------------------------------------------------
    def _finish(self) -> int:
        """The controller has told the others to stop; who had not said hello by then did not hear it."""
        if self._run_dir.stop.exists() and not self._under_way:
            self._children.end()
            return 0
        for name in self._children.drain():
            _tell(f"{name} did not end in time after the run's end; ending it")
        return 0

    def _interrupted(self) -> int | None:
        self._interrupts += 1
        if self._interrupts == 1:
            _tell("stopping after the current step (again to end every process now)")
            self._run_dir.stop.touch()
            return None
        _tell("ending every process now")
        self._children.end()
        self._write_state("stopped", "interrupted twice")
        return INTERRUPTED

    def _fail(self, child: Child, sentence: str) -> int:
        """End the run; what the controller itself said of its failure is kept."""
        whole = f"{sentence}\n{excerpt(child.log)}\nlog: {child.log}"
        _tell(f"the run failed: {whole}")
        self._children.end()
        state = read_json(self._run_dir.state) or {}
        said = child.process.role == "controller" and state.get("status") == "failed" and child.code > 0
        if not said:
            self._write_state("failed", whole)
        return _exit_code(child)

    def _note(self, child: Child, sentence: str, done: str, *, pid: int | None = None) -> None:
        """Tell the user, the controller and the record."""
        if child.code > 0:  # it may have said why
            sentence = f"{sentence}: {excerpt(child.log).splitlines()[-1].strip()}"
        _tell(f"{sentence}; {done} (log: {child.log})")
        casualty = Casualty(
            attempt=max(self._run_dir.attempts(), default=1),
            role=child.process.role,
            index=child.process.index,
            pid=self._pulse.pid(child.name) if pid is None else pid,
            sentence=sentence,
            done=done,
            at=time.time(),
        )
        casualties.append(self._run_dir, casualty)

    def _write_state(self, status: str, error: str) -> None:
        """The controller owns state.json while it lives: this is the last word on a run that it could not finish."""
        state: dict[str, Any] = read_json(self._run_dir.state) or {}
        state |= {"status": status, "error": error, "engines": [], "updated": time.time()}
        self._run_dir.write_json(self._run_dir.state, state)


def _sentence(child: Child) -> str:
    if child.killed_because:
        return f"{child.name} was killed: {child.killed_because}"
    return f"{child.name} {how_it_ended(child.code)}"


def _exit_code(child: Child) -> int:
    """Of a run that this child ended: what says to whoever started the run what to do."""
    if child.process.role != "controller" and child.code != LockError.exit_code:
        return RunError.exit_code
    if child.code in (UNFORESEEN, InfrastructureError.exit_code):
        return RunError.exit_code
    return child.code if child.code > 0 else SIGNALLED - child.code


def _tell(sentence: str) -> None:
    print(f"prl: {sentence}", file=sys.stderr, flush=True)
