"""`python -m prl_slurm RUN`: the job's own process, on its first node. The batch script becomes this.

    queued again? ─► resume ─► preflight ─► supervise (prl.supervise, with srun to start processes) ─┬─► the run is over
                                                                                                   │
           time limit, preemption: cut ── a node is lost, and none is left ── SIGTERM from Slurm ──┴─► queue again

What becomes of a process that dies is `prl.supervise`'s to decide; this says on which node its next life is, and when
the job as a whole must go back into the queue to find other nodes or more time.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from prl.compose import chain
from prl.compose.compose import Composition, open_run
from prl.compose.plan import LaunchPlan, plan
from prl.compose.resume import resume
from prl.errors import InfrastructureError, PrlError, RunError
from prl.run_dir import RunDir, read_json
from prl.supervise.supervisor import supervise

from prl_slurm import SlurmConfig, commands, steps
from prl_slurm.allocation import Nodes
from prl_slurm.preflight import Examination, Problems
from prl_slurm.spawn import NoNodeError, Spawner
from prl_slurm.steps import Job, Step

GRACE_SECONDS = 20.0


def main(run_dir: RunDir) -> int:
    """One turn of the run; the exit code of the job."""
    job = Job.ours()
    try:
        turn = Turn(run_dir, job, _composition(run_dir, job))
        return turn.run()
    except PrlError as error:
        _tell(str(error))
        write_state(run_dir, "failed", str(error))
        return error.exit_code


def _composition(run_dir: RunDir, job: Job) -> Composition:
    """A job that was queued again goes on from the newest cut, as `prl resume` would."""
    chain.settle(run_dir)
    return resume(run_dir).composition if job.restarts else open_run(run_dir)


class Turn:
    """From the start of the job, or its next one, to its end."""

    def __init__(self, run_dir: RunDir, job: Job, composition: Composition) -> None:
        config = composition.run.launcher
        assert isinstance(config, SlurmConfig)
        self._run_dir = run_dir
        self._job = job
        self._config = config
        self._plan: LaunchPlan = plan(composition, run_dir)
        self._nodes = Nodes.given(self._plan, config, job.components)
        self._must_cut = False
        self._began_at: int = (read_json(run_dir.state) or {}).get("step", 0)

    def run(self) -> int:
        """PrlError when it cannot begin."""
        signal.signal(signal.SIGUSR1, self._cut)
        self._remember()
        self._preflight()
        spawner = Spawner(self._job, self._config, self._run_dir, self._nodes)
        guards = self._guards()
        try:
            code = supervise(self._plan, spawner, grace=GRACE_SECONDS, trainer_nodes=spawner.trainer_nodes)
        except NoNodeError as error:
            return self._again(str(error))
        finally:
            for guard in guards:
                guard.kill()
        if self._must_cut and self._status == "stopped":
            return self._again("the time of this turn is over")
        return code

    @property
    def _status(self) -> str:
        status: str = (read_json(self._run_dir.state) or {}).get("status", "")
        return status

    def _cut(self, number: int, frame: object) -> None:
        """The turn is about to end: the run makes its cut, as if it had been asked to stop."""
        del number, frame
        if not self._run_dir.stop.exists():  # somebody asked before: then it is the end
            self._must_cut = True
            self._run_dir.stop.touch()

    def _guards(self) -> list[Step]:
        """On two other nodes, for the node of this process may be lost, and one of theirs."""
        first, *others = dict.fromkeys(host for component in self._job.components for host in component)
        fit = [host for host in others if host not in self._nodes.lost]
        return [steps.guard(self._job, self._config, host, first) for host in fit[-2:]]

    # --- before -------------------------------------------------------------------------------------------------------
    def _preflight(self) -> None:
        """RunError names every node that cannot take part and has no spare."""
        gpus = {host: 0 for component in self._job.components for host in component}
        for process in self._plan.processes:
            place = self._nodes.place(process)
            gpus[place.host] = max(gpus[place.host], place.first_gpu + process.gpus)
        for host in self._nodes.spares:
            gpus[host] = max(group.gpus for group in self._plan.groups)
        with Examination(self._job, self._config, self._run_dir, gpus) as examination:
            self._do_without({host: problems for host, problems in examination.look().items() if problems})
            self._run_dir.write_json(_folder(self._run_dir) / "preflight.json", {"MB/s": examination.speeds()})
            while bad := examination.together(self._nodes.of("trainer"), self._nodes.beside("trainer")):
                self._do_without(bad)

    def _do_without(self, bad: Problems) -> None:
        """RunError names every node that cannot take part and has no spare."""
        for host in [host for host in self._nodes.spares if host in bad]:
            self._lose(host, bad[host])
        stuck = [host for host in self._nodes.hosts if host in bad and not self._lose(host, bad[host])]
        if stuck:
            lines = "\n".join(f"  {host}   {problem}" for host in stuck for problem in bad[host])
            exclude = ",".join(filter(None, [self._config.exclude, *stuck]))
            count = sum(len(component) for component in self._job.components)
            raise RunError(
                f"{len(stuck)} of {count} nodes cannot take part, and no spare is left\n{lines}\n"
                f"mend them, or leave them out: prl resume --set launcher.exclude={exclude}"
            )

    def _lose(self, host: str, problems: list[str]) -> str | None:
        spare = self._nodes.lose(host, "; ".join(problems))
        _tell(f"{host} takes no part: {'; '.join(problems)}" + (f"; {spare} takes its place" if spare else ""))
        return spare

    # --- after --------------------------------------------------------------------------------------------------------
    def _again(self, reason: str) -> int:
        """Back into the queue, unless that has been tried often enough, or changes nothing."""
        turns = _turns(self._run_dir)
        if len(turns) > self._config.requeues:
            return self._give_up(f"{reason}, and the job was queued {len(turns)} times (launcher.requeues)")
        if len(turns) > 2 and len({turn["step"] for turn in turns[-3:]}) == 1:
            return self._give_up(f"{reason}, and three turns in a row trained nothing that a checkpoint kept")
        write_state(self._run_dir, "queued again", reason)
        _tell(f"queueing again: {reason}")
        try:
            commands.requeue(self._job.id)
        except InfrastructureError as error:
            return self._give_up(f"{reason}, and the job cannot queue again by itself: {error}; use prl resume")
        # What follows is Slurm's: it ends this process.
        signal.pause()
        return 0

    def _give_up(self, sentence: str) -> int:
        _tell(f"the run failed: {sentence}")
        write_state(self._run_dir, "failed", sentence)
        return RunError.exit_code

    def _remember(self) -> None:
        turn = {"job": self._job.id, "restarts": self._job.restarts, "step": self._began_at, "time": time.time()}
        with _file(self._run_dir).open("a") as file:
            file.write(f"{json.dumps(turn)}\n")


def _folder(run_dir: RunDir) -> Path:
    return run_dir.path / "slurm"


def _file(run_dir: RunDir) -> Path:
    return _folder(run_dir) / "turns.jsonl"


def _turns(run_dir: RunDir) -> list[dict[str, Any]]:
    """Every turn since the job was submitted: a job that is submitted anew starts counting anew."""
    turns = [json.loads(line) for line in _file(run_dir).read_text().splitlines()]
    return [turn for turn in turns if turn["job"] == turns[-1]["job"]]


def write_state(run_dir: RunDir, status: str, error: str) -> None:
    """No controller lives that would write it."""
    state = read_json(run_dir.state) or {}
    run_dir.write_json(run_dir.state, state | {"status": status, "error": error, "updated": time.time()})


def _tell(sentence: str) -> None:
    print(f"prl: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(RunDir(sys.argv[1])))
