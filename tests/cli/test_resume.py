"""`prl resume` and `prl launch --from`: what they start from and rewind, and what they refuse before they start."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prl import checkpoint_dir
from prl.checkpoint_dir import CheckpointManifest
from prl.cli import main, resume
from prl.cli.runs import alive
from prl.compose.compose import compose, open_run
from prl.compose.origin import identity
from prl.compose.resume import resume as prepare
from prl.errors import UserError
from prl.run_dir import SUPERVISOR, RunDir, read_json
from prl.supervise.claim import claimed

Throwaway = Callable[..., Path]

NOTED = """
    import attrs
    from prl import hookimpl
    from prl.compose.config import LauncherConfig
    from prl.providers import Launcher

    @attrs.frozen(kw_only=True)
    class Config(LauncherConfig):
        pass

    @hookimpl
    def prl_launchers():
        return [Launcher(name="noted", config=Config, summary="", build="prl_noted:Noted")]

    class Noted:
        def __init__(self, config, run_dir):
            self.run_dir = run_dir

        def check(self, plan):
            pass

        def launch(self, plan):
            (self.run_dir / "launched").write_text(str(len(plan.processes)))
            return 0
"""


@pytest.fixture
def config(toy_config: Path, throwaway_plugin: Throwaway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of 9 steps whose launcher starts nothing, in an empty working directory."""
    throwaway_plugin("noted", NOTED)
    monkeypatch.setattr(resume, "ENDING_SECONDS", 0.0)
    path = tmp_path / "work" / "config.toml"
    path.parent.mkdir()
    path.write_text('extends = "../toy.toml"\nplugins = ["noted"]\n[launcher]\ntype = "noted"\n[run]\nsteps = 9\n')
    monkeypatch.chdir(path.parent)
    return path


@pytest.fixture
def run_dir(config: Path) -> RunDir:
    """A run that was killed in step 5, with checkpoints of steps 2 and 4."""
    assert main(["launch", str(config), "--set", "run.dir=runs/first"]) == 0
    run_dir = RunDir.existing("runs/first")
    (run_dir.path / "launched").unlink()
    for step in (2, 4):
        write_checkpoint(run_dir, step)
    write_lines(run_dir.metrics, [{"step": step, "phase": "rl"} for step in range(1, 6)])
    write_lines(run_dir.rollouts, [{"step": step} for step in (1, 4, 4, 5)])
    run_dir.write_json(run_dir.state, {"status": "running", "step": 5, "error": "", "metrics": {"loss/rl": 1.0}})
    run_dir.controller.write_text("{}")
    run_dir.stop.touch()
    return run_dir


def write_checkpoint(run_dir: RunDir, step: int) -> Path:
    """As the run writes it, with nothing inside."""
    path = run_dir.checkpoints / f"step-{step}"
    folder = checkpoint_dir.partial(path)
    folder.mkdir(parents=True)
    files = {name: checkpoint_dir.write_json(folder / name, name) for name in checkpoint_dir.CONTROLLER_FILES}
    manifest = CheckpointManifest(
        format=checkpoint_dir.FORMAT, step=step, identity=identity(open_run(run_dir)), files=files
    )
    checkpoint_dir.commit(path, manifest)
    return path


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str, code: int) -> str:
    """The sentence; nothing was started, and nothing changed."""
    before = contents(folder)
    capsys.readouterr()
    assert main(arguments) == code
    assert contents(folder) == before
    return capsys.readouterr().err


# --- resume -----------------------------------------------------------------------------------------------------------
def test_a_killed_run_goes_on_from_its_newest_checkpoint_as_its_next_attempt(run_dir, capsys):
    token = run_dir.token()
    (run_dir.checkpoints / "step-6.partial").mkdir()
    assert main(["resume"]) == 0
    assert "runs/first, attempt 2 from step 4" in capsys.readouterr().out
    assert (run_dir.path / "launched").read_text() == "4"
    assert run_dir.attempts() == [1, 2]
    assert run_dir.token() != token
    assert Path(open_run(run_dir).run.checkpoints.resume) == run_dir.checkpoints / "step-4"
    assert not any(path.exists() for path in (run_dir.stop, run_dir.controller, run_dir.processes))
    assert [path.name for path in run_dir.checkpoints.iterdir() if "partial" in path.name] == []
    state = read_json(run_dir.state)
    assert (state["status"], state["step"], state["metrics"]) == ("starting", 4, {"loss/rl": 1.0})


def test_a_run_that_another_process_is_about_to_start_is_refused(run_dir, capsys):
    with claimed(run_dir):
        said = refused(capsys, run_dir.path, "resume", code=2)
    assert "runs/first is launched or resumed by another prl" in said
    assert main(["resume"]) == 0


@pytest.mark.parametrize(
    ("left", "trainer", "start"),
    [
        (2, {"nodes": 2, "ranks": 4, "replicate": 1, "shard": 0}, "step 4 on 2 of 3 trainer nodes"),
        (1, {}, "step 4"),  # fewer than half
        (3, {}, "step 4"),
    ],
)
def test_an_attempt_on_fewer_trainer_nodes_leaves_the_config_alone(config, left, trainer, start):
    edits = ("trainer.ranks=6", "trainer.nodes=3", "run.dir=runs/wide")
    assert main(["launch", str(config), *(word for edit in edits for word in ("--set", edit))]) == 0
    run_dir = RunDir.existing("runs/wide")
    write_checkpoint(run_dir, 4)
    before = run_dir.config.read_text()
    attempt = prepare(run_dir, trainer_nodes=left)
    whole = {"nodes": 3, "ranks": 6}
    seen = open_run(run_dir).run.trainer
    assert (attempt.composition.run.trainer, attempt.start) == (seen, start)
    assert {"nodes": seen.nodes, "ranks": seen.ranks} == {key: (trainer or whole)[key] for key in whole}
    assert (read_json(run_dir.resume).get("trainer", {}), run_dir.config.read_text()) == (trainer, before)
    assert prepare(run_dir).composition.run.trainer.ranks == open_run(run_dir).run.trainer.ranks == 6


def test_every_step_appears_once_in_the_record(run_dir):
    with run_dir.metrics.open("a") as file:
        file.write('{"step": 4, "phase": "eval"}\n{"step": 2, "phase": "eval"}\n{"step": 5, "pha')
    assert main(["resume"]) == 0
    assert steps_in(run_dir.metrics) == [1, 2, 3, 4, 2]
    assert steps_in(run_dir.rollouts) == [1, 4, 4]
    aside = (run_dir.logs(1) / "metrics.jsonl").read_text()
    assert aside == '{"step": 5, "phase": "rl"}\n{"step": 4, "phase": "eval"}\n{"step": 5, "pha'
    assert steps_in(run_dir.logs(1) / "rollouts.jsonl") == [5]


def test_a_run_without_a_checkpoint_begins_again(config):
    assert main(["launch", str(config), "--set", "run.dir=runs/early"]) == 0
    run_dir = RunDir.existing("runs/early")
    write_lines(run_dir.metrics, [{"step": 1, "phase": "warmup"}])
    assert main(["resume", "early"]) == 0
    assert open_run(run_dir).run.checkpoints.resume == ""
    assert run_dir.metrics.read_text() == ""
    assert main(["resume", "early"]) == 0
    assert run_dir.attempts() == [1, 2, 3]


def test_the_config_can_be_changed_and_still_repeats_the_run_from_where_it_began(run_dir):
    before = run_dir.config.read_text()
    assert main(["resume", "--set", "run.steps=20", "--set", "optimizer.learning_rate=0.5"]) == 0
    assert (run_dir.logs(1) / "run.toml").read_text() == before
    run = compose(run_dir.config).run
    assert (run.run.steps, run.optimizer.learning_rate, run.checkpoints.resume) == (20, 0.5, "")


def test_a_finished_run_needs_more_steps(run_dir, capsys):
    write_checkpoint(run_dir, 9)
    run_dir.write_json(run_dir.state, {"status": "finished"})
    assert "has finished all of its 9 steps; give it more" in refused(capsys, run_dir.path, "resume", code=2)
    assert main(["resume", "--set", "run.steps=10"]) == 0


def test_other_plugins_are_refused_unless_the_lock_is_rewritten(run_dir, throwaway_plugin, capsys):
    throwaway_plugin("extra", "")
    sentence = refused(capsys, run_dir.path, "resume", "--plugins", "extra", code=3)
    assert "extra: in run.toml, not in plugins.lock" in sentence
    assert sentence.endswith("prl resume --relock\n")
    assert main(["resume", "--plugins", "extra", "--relock"]) == 0
    assert "extra: in run.toml, not in plugins.lock" in capsys.readouterr().out
    assert [plugin.name for plugin in open_run(run_dir).plugins] == ["toy", "noted", "extra"]


def test_a_foreign_model_and_a_damaged_checkpoint_are_refused(run_dir, capsys):
    sentence = refused(capsys, run_dir.path, "resume", "--set", "model.width=9", code=1)
    assert "step-4 belongs to another config:\n  model.width: 8 there, 9 here\n" in sentence
    (run_dir.checkpoints / "step-4" / "controller.json").write_text('"Controller.json"')
    sentence = refused(capsys, run_dir.path, "resume", code=1)
    assert "step-4/controller.json is damaged: its checksum is" in sentence
    assert "remove this checkpoint to continue from the one before" in sentence


@pytest.fixture
def living(run_dir: RunDir) -> Iterator[int]:
    """A process whose command line names the run."""
    script = "import sys; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(run_dir.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield process.pid
        process.kill()


def started(run_dir: RunDir, pid: int, host: str) -> None:
    process = {"role": "engine", "index": 0, "pid": pid, "host": host, "log": "", "started": 0.0}
    run_dir.write_json(run_dir.processes, [process])


def test_a_run_that_lives_is_refused_whatever_its_state_says(run_dir, living, capsys):
    started(run_dir, living, socket.gethostname())
    for status in ("running", "failed"):
        run_dir.write_json(run_dir.state, {"status": status})
        sentence = refused(capsys, run_dir.path, "resume", code=2)
        assert f"is still going: engine-0 (pid {living} on {socket.gethostname()}); `prl stop` ends it\n" in sentence


@pytest.mark.parametrize(
    ("word", "lives"), [("prl", True), ("/envs/prl/bin/prl", True), ("/src/prl/bin/pytest", False)]
)
def test_a_launcher_is_known_by_its_program_not_by_the_folder_it_lies_in(run_dir, word, lives):
    script = "import sys; print(flush=True); sys.stdin.read()"
    command = ["launcher", "-c", script, word]
    with subprocess.Popen(command, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        launcher = {"role": SUPERVISOR, "index": 0, "pid": process.pid, "host": socket.gethostname()}
        assert alive(launcher, run_dir) is lives
        process.kill()


def test_what_another_host_does_is_believed_once_the_run_has_ended(run_dir):
    started(run_dir, os.getpid(), "elsewhere")
    with pytest.raises(UserError, match=r"if those of another host are gone, remove .*processes\.json"):
        resume.refuse_living(run_dir, patience=0.0)
    run_dir.write_json(run_dir.state, {"status": "stopped"})
    resume.refuse_living(run_dir, patience=0.0)


def test_what_is_left_of_a_killed_run_may_end_meanwhile(run_dir, living):
    started(run_dir, living, socket.gethostname())
    os.kill(living, 9)
    resume.refuse_living(run_dir, patience=20.0)


# --- launch --from ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("origin", "step"), [("first", 4), ("first@2", 2), ("runs/first@4", 4)])
def test_a_fork_is_a_new_run_that_starts_from_a_checkpoint(run_dir, config, origin, step):
    assert main(["launch", str(config), "--from", origin, "--set", "run.dir=runs/fork"]) == 0
    fork = RunDir.existing("runs/fork")
    assert Path(open_run(fork).run.checkpoints.resume) == run_dir.checkpoints / f"step-{step}"
    assert fork.attempts() == [1]
    assert main(["resume", "fork"]) == 0
    assert Path(open_run(fork).run.checkpoints.resume) == run_dir.checkpoints / f"step-{step}"


def test_what_a_fork_cannot_start_from(run_dir, config, capsys):
    def sentence(*arguments: str, code: int) -> str:
        return refused(capsys, Path("."), "launch", str(config), *arguments, code=code)

    assert "has no checkpoint of step 3; it has those of 2, 4" in sentence("--from", "first@3", code=2)
    assert "model.width: 8 there, 9 here" in sentence("--from", "first", "--set", "model.width=9", code=1)
    done = sentence("--from", "first", "--set", "run.steps=4", code=2)
    assert "step-4 is at step 4, and this run ends after step 4 (warmup.steps + run.steps)" in done
    (run_dir.checkpoints / "step-2" / "pending.groups").unlink()
    assert "step-2/pending.groups is missing" in sentence("--from", "first@2", code=1)
    assert main(["launch", str(config), "--set", "run.dir=runs/new"]) == 0
    assert "new has no complete checkpoint" in sentence("--from", "new", code=2)


# --- launch --after ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("origin", "step"), [("first", 4), ("first@2", 2)])
def test_a_run_after_a_finished_one_starts_from_its_checkpoint(run_dir, config, origin, step):
    run_dir.write_json(run_dir.state, {"status": "finished"})
    assert main(["launch", str(config), "--after", "first", "--from", origin, "--set", "run.dir=runs/next"]) == 0
    following = RunDir.existing("runs/next")
    assert Path(open_run(following).run.checkpoints.resume) == run_dir.checkpoints / f"step-{step}"
    assert (following.path / "launched").is_file()
    write_checkpoint(run_dir, 9)  # what has begun keeps its start
    assert main(["resume", "next"]) == 0
    assert Path(open_run(following).run.checkpoints.resume) == run_dir.checkpoints / f"step-{step}"


def test_a_run_after_one_that_failed_begins_when_that_has_finished(run_dir, config, capsys):
    run_dir.write_json(run_dir.state, {"status": "failed"})
    run_dir.write_json(run_dir.processes, [])
    started(run_dir, 2**22, socket.gethostname())
    assert main(["launch", str(config), "--after", "first", "--from", "first", "--set", "run.dir=runs/next"]) == 1
    following = RunDir.existing("runs/next")
    assert "which this run follows, has not finished (status failed)" in capsys.readouterr().err
    assert read_json(following.state)["status"] == "failed"
    assert not (following.path / "launched").exists()
    run_dir.write_json(run_dir.state, {"status": "finished"})
    assert main(["resume", "next"]) == 0
    assert Path(open_run(following).run.checkpoints.resume) == run_dir.checkpoints / "step-4"


def test_a_run_that_waits_can_be_stopped_and_another_needs_no_checkpoint(run_dir, config, living, capsys):
    run_dir.write_json(run_dir.state, {"status": "running"})
    started(run_dir, living, socket.gethostname())
    words = ["launch", str(config), "--after", "first", "--set", "run.dir=runs/next"]
    following = RunDir("runs/next")
    stopper = threading.Thread(target=stop_when_it_waits, args=(following,))
    stopper.start()
    assert main(words) == 130
    stopper.join()
    assert read_json(following.state)["status"] == "stopped"
    assert not (following.path / "launched").exists()
    run_dir.write_json(run_dir.state, {"status": "finished"})
    assert main(["resume", "next"]) == 0
    assert (open_run(following).run.checkpoints.resume, following.stop.exists()) == ("", False)


def stop_when_it_waits(run_dir: RunDir) -> None:
    while (read_json(run_dir.state) or {}).get("status") != "waiting":
        time.sleep(0.01)
    run_dir.stop.touch()


# --- sweeps -----------------------------------------------------------------------------------------------------------
def test_the_runs_of_a_sweep_that_have_not_finished_go_on(config, capsys):
    assert main(["launch", str(config), "--sweep", "run.seed=1,2,3", "--set", "run.dir=runs/swept"]) == 0
    runs = [RunDir(f"runs/swept/{index}-seed={index + 1}") for index in range(3)]
    runs[0].write_json(runs[0].state, {"status": "finished"})
    lock = read_json(runs[1].lock)
    lock["plugins"][0]["version"] = "9"
    runs[1].write_json(runs[1].lock, lock)
    for each in runs:
        (each.path / "launched").unlink()
    assert main(["resume", "swept"]) == 3
    assert "To go on with what is here" in capsys.readouterr().err
    assert [(each.path / "launched").exists() for each in runs] == [False, False, True]
    assert [each.attempts() for each in runs] == [[1], [1], [1, 2]]
