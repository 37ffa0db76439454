"""Whole runs on a real Slurm: across nodes, side by side, through lost nodes and the end of their time."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from prl.run_dir import RunDir

from tests.slurm.cluster import Cluster, until
from tests.slurm.jobs import PATIENCE, TWO_TRAINER_NODES, Job, command, launch
from tests.terminal import on_terminal

THRESHOLD = 0.6
"""Share of vowels in what the policy says; it begins below a third of that, and passes it after some 20 steps."""
LEARNS = ("run.steps=40", "engine.nodes=2", "rollouts.workers=2", *TWO_TRAINER_NODES)
ENDLESS = ("run.steps=100000", "checkpoints.every=20", "checkpoints.keep_last=3")


@pytest.fixture(autouse=True)
def all_nodes_idle(slurm: Cluster) -> Iterator[None]:
    """A test finds every node up, and leaves no job and no node behind."""
    yield
    for job in slurm.jobs():
        slurm.command("scancel", "--full", job)
    until(lambda: not slurm.jobs(), "jobs are left")
    for node, state in slurm.states().items():
        if state.startswith("down"):
            slurm.power_on(node)


# --- the main job -----------------------------------------------------------------------------------------------------
def test_the_main_job_learns_across_four_nodes(slurm: Cluster, tmp_path: Path) -> None:
    dry = command(slurm, tmp_path / "main", *LEARNS, words=["--dry-run"])
    assert dry.returncode == 0, dry.stderr
    assert not (tmp_path / "main").exists()
    run = launch(slurm, tmp_path / "main", *LEARNS)
    submitted = run.dir.path / "slurm"
    shown = dry.stdout.partition("--- slurm/job.sh\n")[2].partition("\n--- slurm/node.sh\n")
    assert (submitted / "job.sh").read_text().rstrip() == shown[0].rstrip()
    assert (submitted / "node.sh").read_text().rstrip() == shown[2].rstrip()
    run.until(lambda: run.state.get("status") == "running", "it did not begin")
    hosts = {f"{entry['role']}-{entry['index']}": entry["host"] for entry in run.entries}
    assert hosts == {
        "controller-0": "node1",
        "engine-0": "node1",
        "engine-1": "node2",
        "environment-0": "node1",
        "environment-1": "node2",
        "trainer-0": "node3",
        "trainer-1": "node4",
    }
    addresses = [slurm.addresses[node] for node in ("node1", "node2")]
    assert [url.removeprefix("http://").partition(":")[0] for url in run.state["engines"]] == addresses
    assert json.loads(run.dir.rendezvous.read_text())["host"] == slurm.addresses["node3"]
    status = run.prl("status")
    assert re.search(rf"^  job +{run.id} RUNNING on node\[1-4\]$", status, re.M)
    assert re.search(r"^  trainer-1 +pid \d+ +node4 +in the job +logs/attempt-1/trainer-1.log$", status, re.M)
    followed = run.prl("logs", "-f")  # until the job is over
    assert {line.partition(" ")[0] for line in followed.splitlines()} == {"controller-0"}  # who else has a word to say
    assert "engine 1 (http://" in followed
    assert run.ended() == "finished"
    rewards = [line["reward/mean"] for line in run.rl_steps]
    assert rewards[0] < THRESHOLD / 2
    assert max(rewards[-5:]) > THRESHOLD
    run.audited()


# --- heterogeneous, side by side, stopped -----------------------------------------------------------------------------
def test_a_heterogeneous_job_is_stopped_beside_another_run_on_its_nodes(slurm: Cluster, tmp_path: Path) -> None:
    apart = launch(slurm, tmp_path / "apart", *ENDLESS, *TWO_TRAINER_NODES, "launcher.allocation=heterogeneous")
    on_node1 = ("launcher.allocation=shared", "launcher.options=['--nodelist=node1']")
    shared = launch(slurm, tmp_path / "shared", "run.steps=8", *on_node1)
    apart.until(lambda: len(apart.rl_steps) >= 3, "it did not begin")
    components = slurm.command("squeue", "-h", "-o", "%i %N", "--jobs", apart.id).splitlines()
    assert [line.split()[0] for line in components] == [f"{apart.id}+0", f"{apart.id}+1"]
    assert {apart.host("trainer-0"), apart.host("trainer-1")}.isdisjoint({apart.host("engine-0")})
    attached_to(apart)
    assert shared.ended() == "finished"
    assert {entry["host"] for entry in shared.entries} == {"node1"}
    assert len(shared.rl_steps) == 8
    shared.audited()
    assert apart.prl("stop").splitlines()[-1] == "stopped"
    until(lambda: not slurm.jobs("apart"), "the job did not leave the queue")
    assert (apart.checkpoint / "manifest.json").is_file()
    assert apart.dir.attempts() == [1]
    apart.audited()


def attached_to(run: Job) -> None:
    """A terminal on another component's node, and the stacks of a rank there."""
    words = [sys.executable, "-m", "prl", "attach", str(run.dir.path), "trainer-1"]
    typed = 'echo "<$(hostname)|$PRL_PROCESS|$PYTHONHASHSEED>"; test -t 0 && exit 7\n'
    code, shown = on_terminal(words, typed=typed, env=run.cluster.env | {"SHELL": "/bin/sh"})
    assert f"<{run.host('trainer-1')}|trainer-1|0>" in shown, shown
    assert code == 7
    out = run.prl("attach", "trainer-1", "--stacks")
    assert [line.partition(" (")[0] for line in out.splitlines() if line.startswith("---")] == [
        "--- trainer-1",
        "--- trainer-rank-1",
    ]
    assert "prl/train/worker.py" in out


def test_a_sweep_is_an_array_of_runs(slurm: Cluster, tmp_path: Path) -> None:
    edits = ("run.steps=3", "launcher.allocation=shared")
    swept = command(slurm, tmp_path / "swept", *edits, words=["--sweep", "run.seed=1,2"])
    assert swept.returncode == 0, swept.stderr
    runs = [Job(dir=RunDir(tmp_path / "swept" / name), cluster=slurm, said="") for name in ("0-seed=1", "1-seed=2")]
    until(lambda: not slurm.jobs("swept"), "the array did not end", PATIENCE)
    assert [(run.state["status"], len(run.rl_steps)) for run in runs] == [("finished", 3)] * 2
    assert runs[0].chain()[3] != runs[1].chain()[3]
    assert [run.id.partition("_")[2] for run in runs] == ["0", "1"]
    assert "COMPLETED" in runs[1].prl("status")
    for run in runs:
        run.audited()


# --- one after another ------------------------------------------------------------------------------------------------
def test_a_run_after_another_is_a_dependency_of_its_job(slurm: Cluster, tmp_path: Path) -> None:
    small = ("launcher.allocation=shared", "engine.count=1")
    before = launch(slurm, tmp_path / "before", "run.steps=2", *small, "launcher.options=['--begin=now+1hour']")
    chain = ("--after", str(before.dir.path), "--from", str(before.dir.path))
    run = launch(slurm, tmp_path / "after", "run.steps=4", *small, words=chain)
    assert "(Dependency)" in run.prl("status")
    assert before.prl("stop").splitlines()[-1] == "stopped"
    until(lambda: not slurm.jobs("after"), "what cannot begin any more is left in the queue")

    before.prl("resume", "--set", "launcher.options=[]")
    run.prl("resume")
    assert set(slurm.jobs("after").values()) == {"PENDING"}
    assert (before.ended(), run.ended()) == ("finished", "finished")
    assert [line["step"] for line in run.steps] == [3, 4]
    assert run.state["step"] == 4
    assert run.begun_from() == before.chain()[2]
    before.audited()
    run.audited()


# --- turns ------------------------------------------------------------------------------------------------------------
def test_a_run_goes_on_after_the_end_of_its_time_and_the_loss_of_its_first_node(slurm: Cluster, tmp_path: Path) -> None:
    run = launch(slurm, tmp_path / "timed", *ENDLESS, "launcher.time='30'", "launcher.cut_seconds=100")
    run.until(lambda: len(run.rl_steps) >= 3, "it did not begin")
    slurm.command("scontrol", "update", f"jobid={run.id}", "timelimit=2")
    until(lambda: slurm.jobs("timed") == {run.id: "PENDING"}, f"it does not queue again: {run.tell()}", PATIENCE)
    assert run.state["status"] == "queued again"
    cut = run.state["step"]
    assert cut == run.steps[-1]["step"]  # no step is lost
    slurm.command("scontrol", "update", f"jobid={run.id}", "timelimit=30")
    until(lambda: len(run.turns) == 2 and run.trains(), f"no second turn: {run.tell()}", PATIENCE)
    assert run.turns[1]["step"] == cut

    first = run.host("controller-0")
    slurm.power_off(first)  # where the job's own process is: Slurm queues the job again
    until(lambda: len(run.turns) == 3 and run.trains(), f"no third turn: {run.tell()}", PATIENCE)
    assert run.host("controller-0") != first
    assert run.turns[2]["step"] >= cut
    assert run.prl("stop").splitlines()[-1] == "stopped"
    assert run.dir.attempts() == [1, 2, 3]
    assert [line["step"] for line in run.steps] == list(range(1, run.state["step"] + 1))
    assert list(run.chain()) == list(range(run.state["step"] + 1))
    run.audited()


# --- nodes that go ----------------------------------------------------------------------------------------------------
def test_a_run_outlives_its_nodes(slurm: Cluster, tmp_path: Path) -> None:
    brief = ("failures.restarts=1", "failures.window=3")
    nodes = ("engine.nodes=2", "launcher.spare_nodes=1", *TWO_TRAINER_NODES)
    run = launch(slurm, tmp_path / "lossy", *ENDLESS, *brief, *nodes)

    def trains_beyond(attempts: list[int], step: int) -> bool:
        return run.dir.attempts() == attempts and run.trains() and run.state["step"] > step + 4

    run.until(lambda: run.kept(), "no checkpoint")
    assert [run.host(name) for name in ("engine-0", "engine-1", "trainer-0", "trainer-1")] == slurm.nodes[:4]

    slurm.power_off("node3")  # a trainer's: the spare takes its place, and training goes on from the last cut
    before = run.state["step"]
    run.until(lambda: trains_beyond([1, 2], before), "it does not train on after the trainer's node")
    assert [run.host(name) for name in ("trainer-0", "trainer-1")] == ["node5", "node4"]

    slurm.power_off("node4")  # no spare is left: half of the trainer's nodes train on
    before = run.state["step"]
    run.until(lambda: trains_beyond([1, 2, 3], before), "it does not train on with one trainer node")
    cut = run.steps_before_attempt()
    assert [run.host("trainer-0"), len(run.entries)] == ["node5", 5]
    assert json.loads(run.dir.resume.read_text())["trainer"] == {"nodes": 1, "ranks": 1, "replicate": 1, "shard": 0}
    assert run.failures()[-1]["done"] == f"attempt 3 goes on from step {cut} on 1 of 2 trainer nodes"
    assert ("process", run.failures()[-1]["done"]) in run.told()
    assert len(run.turns) == 1

    slurm.power_off("node2")  # an engine's, and no spare is left
    run.until(lambda: "the run goes on without it" in run.failures()[-1]["done"], "engine-1 is not given up")
    assert [line["role"] for line in run.failures()] == ["trainer", "trainer", "engine", "engine"]
    before = run.state["step"]
    run.until(lambda: run.state["step"] > before + 4, "it does not train on without engine-1")
    assert run.dir.attempts() == [1, 2, 3]

    slurm.power_off("node5")  # the trainer's last: there is no node for it in this job
    until(lambda: slurm.jobs("lossy") == {run.id: "PENDING"}, f"it does not wait: {run.tell()}", PATIENCE)
    for node in slurm.nodes[1:]:
        slurm.power_on(node)
    until(lambda: len(run.turns) == 2 and run.state["status"] == "running", f"no second turn: {run.tell()}", PATIENCE)
    assert run.turns[1]["step"] in range(20, before + 1000, 20)
    assert len([entry for entry in run.entries if entry["role"] == "trainer"]) == 2  # the whole mesh again
    assert run.prl("stop").splitlines()[-1] == "stopped"
    assert list(run.chain()) == list(range(run.state["step"] + 1))
    run.audited()


# --- before training --------------------------------------------------------------------------------------------------
EXTRA = "from prl import hookimpl\n"


def test_a_plugin_that_one_node_lacks_is_refused_before_training(slurm: Cluster, tmp_path: Path) -> None:
    site = install(tmp_path / "site", "extra")
    for node in slurm.nodes:
        (tmp_path / node).symlink_to(site if node != "node3" else tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    here = attrs.evolve(slurm, more={"PYTHONPATH": str(site)})
    setup = f"launcher.setup=['export PYTHONPATH={tmp_path}/$SLURMD_NODENAME']"
    run = launch(here, tmp_path / "lacking", *LEARNS, setup, words=["--plugins", "extra"])
    assert run.ended() == "failed"
    error = run.state["error"].splitlines()
    assert error[0] == "1 of 4 nodes cannot take part, and no spare is left"
    assert "node3" in error[1]
    assert any(line.strip().startswith("extra: launched with 0.0.1") for line in error)
    assert error[-1].endswith("prl resume --set launcher.exclude=node3")
    assert not run.steps


STOPS = """
import os, signal, sys
if "prl_slurm.drill" in sys.orig_argv:
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_spares_take_the_place_of_nodes_that_cannot_add_up_a_number(slurm: Cluster, tmp_path: Path) -> None:
    """node3's process is stopped, and the spare node4 has no interface for gloo: the second spare trains."""
    (tmp_path / "node3").mkdir()
    (tmp_path / "node3" / "sitecustomize.py").write_text(STOPS)
    wrong = "if [ $SLURMD_NODENAME = node4 ]; then export GLOO_SOCKET_IFNAME=nowhere; fi"
    setup = f"launcher.setup=['export PYTHONPATH={tmp_path}/$SLURMD_NODENAME', '{wrong}']"
    brief = ("launcher.spare_nodes=2", "launcher.collective_seconds=12")
    run = launch(slurm, tmp_path / "spared", "run.steps=2", *TWO_TRAINER_NODES, *brief, setup)
    assert run.ended() == "finished", run.tell()
    assert [run.host(name) for name in ("engine-0", "trainer-0", "trainer-1")] == ["node1", "node2", "node5"]
    said = [line.partition("prl: ")[2] for line in (run.dir.path / "slurm" / "job.log").read_text().splitlines()]
    lost = [line.partition(" takes no part: ")[::2] for line in said if "takes no part" in line]
    assert [host for host, _ in lost] == ["node3", "node4"]
    assert lost[0][1] == "was not ready to add up a number 12 s after others; node4 takes its place"
    assert lost[1][1].endswith("; node5 takes its place")
    files = json.loads((run.dir.path / "slurm" / "preflight.json").read_text())["MB/s"]
    assert all(speeds["write"] > 0 and speeds["read"] > 0 for speeds in files.values())
    assert list(files) == slurm.nodes
    assert list((run.dir.path / "slurm").glob("preflight-*")) == []


def install(site: Path, name: str) -> Path:
    """A distribution `prl-NAME` with a plugin that provides nothing, in a folder of its own."""
    (site / f"prl_{name}").mkdir(parents=True)
    (site / f"prl_{name}" / "__init__.py").write_text(EXTRA)
    metadata = site / f"prl_{name}-0.0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: prl-{name}\nVersion: 0.0.1\n")
    (metadata / "entry_points.txt").write_text(f"[prl]\n{name} = prl_{name}\n")
    return site


@pytest.mark.parametrize(
    ("edits", "sentence"),
    [
        (["launcher.partition=nowhere"], "sbatch would refuse this job: .*invalid partition specified: nowhere"),
        (["launcher.spare_nodes=9"], "sbatch would refuse this job: "),
        (["launcher.gres='gpu:9'"], "sbatch would refuse this job: "),
        (["launcher.free_gb=1e9"], r"run.dir: /.* has .* GB left, and launcher.free_gb is 1e\+09"),
    ],
)
def test_what_slurm_would_refuse_is_refused_before_anything_is_made(
    slurm: Cluster, tmp_path: Path, edits: list[str], sentence: str
) -> None:
    refused = command(slurm, tmp_path / "refused", *edits)
    assert refused.returncode == 2
    assert re.search(sentence, refused.stderr)
    assert not (tmp_path / "refused").exists()


def test_a_run_that_waits_is_taken_out_of_the_queue(slurm: Cluster, tmp_path: Path) -> None:
    run = launch(slurm, tmp_path / "waiting", "launcher.options=['--begin=now+1hour']")
    assert slurm.jobs("waiting") == {run.id: "PENDING"}
    assert "(BeginTime)" in run.prl("status")
    assert run.prl("stop").splitlines()[-1] == "stopped"
    assert slurm.jobs("waiting") == {}
    assert run.prl("status").split()[2] == "stopped"
