"""Launcher `slurm` without a cluster: what it asks for, where processes go, what a probe's words mean."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
from prl.compose.compose import compose
from prl.compose.plan import LaunchPlan, NodeGroup, Process, plan
from prl.errors import ConfigError, InfrastructureError, UserError
from prl.run_dir import RunDir
from prl_slurm import ContainerSection, NodesSection, SlurmConfig, commands, disk, script
from prl_slurm.allocation import Nodes, Place, requests
from prl_slurm.launcher import SlurmLauncher
from prl_slurm.preflight import Probe, blame, pairs_of, unreachable
from prl_slurm.probe import devices
from prl_slurm.steps import Job, Step, command, interactive
from prl_slurm.task import choose

GROUPS = (NodeGroup(name="inference", nodes=2, cpus=5, gpus=2), NodeGroup(name="trainer", nodes=1, cpus=8, gpus=4))
RUN = Path("/shared/runs/tale")


def process(role: str, index: int, group: str, node: int, *, first_gpu: int = 0, gpus: int = 0) -> Process:
    argv = ("python", "-m", "prl", "worker", "--role", role)
    return Process(
        role=role, index=index, argv=argv, env={}, cpus=1, gpus=gpus, first_gpu=first_gpu, group=group, node=node
    )


ENGINE = process("engine", 3, "inference", 1, first_gpu=1, gpus=1)
TRAINER = process("trainer", 0, "trainer", 0, gpus=4)
PLAN = LaunchPlan(run_dir=RunDir(RUN), processes=(ENGINE, TRAINER), groups=GROUPS)


# --- what is asked for ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("allocation", "spares", "asked"),
    [("one", 1, [(4, 8, 4)]), ("shared", 1, [(3, 13, 6)]), ("heterogeneous", 0, [(2, 5, 2), (1, 8, 4)])],
)
def test_components_hold_what_the_groups_need(allocation: Any, spares: int, asked: list[tuple[int, ...]]) -> None:
    config = SlurmConfig(allocation=allocation, spare_nodes=spares)
    assert [(r.nodes, r.cpus, r.gpus) for r in requests(PLAN, config)] == asked


def test_the_script_of_one_allocation() -> None:
    config = SlurmConfig(
        partition="h200",
        account="rl",
        qos="high",
        constraint="ib",
        exclude="bad[1-2]",
        time="1-00:00:00",
        dependency="afterok:7",
        options=("--comment=tale",),
        modules=("cuda/12.9", "nccl"),
        setup=("export X=1",),
        venv="/shared/venv",
        cut_seconds=90,
    )
    assert script.job(PLAN, config).splitlines() == [
        "#!/bin/bash",
        "#SBATCH --nodes=3",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --gres=gpu:4",
        "#SBATCH --mem=0",
        "#SBATCH --partition=h200",
        "#SBATCH --constraint=ib",
        "#SBATCH --exclusive",
        "#SBATCH --job-name=tale",
        "#SBATCH --account=rl",
        "#SBATCH --qos=high",
        "#SBATCH --exclude=bad[1-2]",
        "#SBATCH --time=1-00:00:00",
        "#SBATCH --output=/shared/runs/tale/slurm/job.log",
        f"#SBATCH --chdir={Path.cwd()}",
        "#SBATCH --no-kill",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:USR1@90",
        "#SBATCH --comment=tale",
        "#SBATCH --dependency=afterok:7",
        "",
        "module load cuda/12.9 nccl",
        ". /shared/venv/bin/activate",
        "export X=1",
        "exec /shared/venv/bin/python -m prl_slurm /shared/runs/tale",
    ]


def test_a_job_that_follows_another_waits_for_it_and_for_what_the_config_says(tmp_path: Path) -> None:
    before = RunDir(tmp_path)
    before.write_json(before.launch, {"launcher": "slurm", "job": "12_3"})
    following = attrs.evolve(PLAN, after=before)
    assert {"--dependency=afterok:12_3", "--kill-on-invalid-dep=yes"} <= set(
        options(script.job(following, SlurmConfig()))
    )
    assert "--dependency=singleton,afterok:12_3" in options(script.job(following, SlurmConfig(dependency="singleton")))
    assert SlurmLauncher(SlurmConfig()).follows(before)
    assert not SlurmLauncher(SlurmConfig()).follows(RunDir(tmp_path / "of this machine"))


def test_components_of_a_heterogeneous_job_have_options_of_their_own() -> None:
    config = SlurmConfig(
        allocation="heterogeneous",
        partition="gpu",
        gres="gpu:h200:8",
        inference=NodesSection(partition="cheap", gres="gpu:l40:8", memory="500G"),
    )
    first, second = script.job(PLAN, config).split("#SBATCH hetjob\n")
    assert {"--nodes=2", "--partition=cheap", "--gres=gpu:l40:8", "--mem=500G"} <= set(options(first))
    assert {"--nodes=1", "--partition=gpu", "--gres=gpu:h200:8", "--mem=0"} <= set(options(second))


def options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_a_template_of_the_users_own(tmp_path: Path) -> None:
    template = tmp_path / "ours.sh"
    template.write_text("#!/bin/bash\n$options\necho $name in $run on $SLURM_JOB_NODELIST ${HOME}\nexec $command\n")
    lines = script.job(PLAN, SlurmConfig(template=str(template))).splitlines()
    assert lines[1] == "#SBATCH --nodes=3"
    assert lines[-2] == "echo tale in /shared/runs/tale on $SLURM_JOB_NODELIST ${HOME}"
    assert lines[-1].endswith(" -m prl_slurm /shared/runs/tale")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("$options\n", r"it has no \$command"),
        ("true\n", r"it has no \$options and no \$command"),
        (None, "No such file"),
    ],
)
def test_a_template_that_starts_nothing_is_refused(tmp_path: Path, text: str | None, sentence: str) -> None:
    template = tmp_path / "ours.sh"
    if text is not None:
        template.write_text(text)
    with pytest.raises(UserError, match=sentence):
        script.job(PLAN, SlurmConfig(template=str(template)))


def test_processes_start_in_the_environment_of_the_script(tmp_path: Path) -> None:
    config = SlurmConfig(setup=("export TALE='a b'", "cd /"))
    (tmp_path / "node.sh").write_text(script.node(config, RUN))
    argv = ["bash", str(tmp_path / "node.sh"), "sh", "-c", 'echo "$TALE|$PWD|$1"', "-", "it's"]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "a b|/|it's\n"


def test_containers() -> None:
    apptainer = ContainerSection(backend="apptainer", image="/images/prl.sif", mounts=("/data:/data",))
    assert script.node(SlurmConfig(container=apptainer), RUN).splitlines()[-1] == (
        f"exec apptainer exec --nv --bind={RUN}:{RUN} --bind={Path.cwd()}:{Path.cwd()} --bind=/data:/data "
        '/images/prl.sif "$@"'
    )
    pyxis = SlurmConfig(container=ContainerSection(backend="pyxis", image="nvcr.io#prl", options=("--no-container-x",)))
    assert script.pyxis(pyxis, RUN) == [
        "--container-image=nvcr.io#prl",
        f"--container-mounts={RUN}:{RUN},{Path.cwd()}:{Path.cwd()}",
        "--no-container-x",
    ]
    assert script.node(pyxis, RUN).splitlines()[-1] == 'exec "$@"'


@pytest.mark.parametrize(
    ("edits", "sentence"),
    [
        (["launcher.allocation=heterogeneous", "launcher.spare_nodes=1"], "no nodes that fit every group"),
        (["launcher.container.image=x.sif"], "needs both a backend and an image"),
        (["run.network=loopback"], "cannot be reached from another node"),
        (["weights.type=shared_memory"], "'shared_memory' reaches the processes of one machine"),
        (["launcher.time=1"], "launcher.time   expected str, got int 1"),
    ],
)
def test_what_cannot_work_on_any_cluster_is_refused(tmp_path: Path, edits: list[str], sentence: str) -> None:
    spell = Path(__file__).parents[2] / "configs" / "spell_backward.toml"
    given = ["launcher.type=slurm", "weights.type=disk", *edits]
    with pytest.raises(ConfigError, match=sentence):
        compose(spell, plugins="slurm,disk", overrides=given)


# --- where processes go -----------------------------------------------------------------------------------------------
def test_groups_have_nodes_of_their_own_and_spares_come_last() -> None:
    nodes = Nodes.given(PLAN, SlurmConfig(spare_nodes=1), [["a", "b", "c", "d"]])
    assert nodes.place(ENGINE) == Place(host="b", component=0, first_gpu=1)
    assert nodes.place(TRAINER) == Place(host="c", component=0, first_gpu=0)
    assert (nodes.hosts, nodes.spares) == (["a", "b", "c"], ["d"])


def test_groups_that_share_nodes_have_devices_of_their_own() -> None:
    nodes = Nodes.given(PLAN, SlurmConfig(allocation="shared"), [["a", "b"]])
    assert nodes.place(ENGINE) == Place(host="b", component=0, first_gpu=1)
    assert nodes.place(TRAINER) == Place(host="a", component=0, first_gpu=2)


def test_components_are_the_groups_of_a_heterogeneous_job() -> None:
    nodes = Nodes.given(PLAN, SlurmConfig(allocation="heterogeneous"), [["a", "b"], ["x"]])
    assert nodes.place(TRAINER) == Place(host="x", component=1, first_gpu=0)


def test_a_spare_takes_all_of_a_lost_node_and_then_none_is_left() -> None:
    nodes = Nodes.given(PLAN, SlurmConfig(spare_nodes=2), [["a", "b", "c", "d", "e"]])
    assert nodes.lose("e", "is down") is None  # a spare itself
    assert nodes.lose("b", "is down") == "d"
    assert nodes.place(ENGINE).host == "d"
    assert nodes.lose("d", "did not answer") is None
    with pytest.raises(InfrastructureError, match="no node is left for engine-3: d did not answer"):
        nodes.place(ENGINE)
    assert nodes.place(TRAINER).host == "c"


def test_a_group_closes_up_over_its_lost_nodes() -> None:
    trainers = attrs.evolve(PLAN, groups=(GROUPS[0], attrs.evolve(GROUPS[1], nodes=3)))
    nodes = Nodes.given(trainers, SlurmConfig(), [["a", "b", "c", "d", "e"]])
    nodes.lose("c", "is down")
    assert nodes.close_up("trainer") == 2
    assert [nodes.place(process("trainer", node, "trainer", node)).host for node in (0, 1)] == ["d", "e"]
    nodes.lose("d", "is down")
    assert (nodes.close_up("trainer"), nodes.place(TRAINER).host) == (1, "e")
    assert nodes.close_up("inference") == 2


def test_a_step_shares_its_node_and_belongs_to_its_component() -> None:
    job = Job(id="7", components=(("a", "b"), ("x",)), restarts=0)
    place = Place(host="x", component=1, first_gpu=2)
    words = command(job, SlurmConfig(venv="/v"), RUN, "trainer-0", place, TRAINER.argv, gpus=4)
    assert words[:2] == ["srun", "--het-group=1"]
    assert {"--nodelist=x", "--overlap", "--job-name=trainer-0"} <= set(words)
    start = words.index("bash")
    assert words[start:] == [
        *("bash", f"{RUN}/slurm/node.sh", "/v/bin/python", "-m", "prl_slurm.task", "2:4"),
        *("/v/bin/python", "-m", "prl", "worker", "--role", "trainer"),
    ]
    assert (job.ids, job.where("x")) == ("7,8", 1)


def test_a_terminal_is_a_step_of_the_job_in_the_environment_of_its_processes() -> None:
    pyxis = ContainerSection(backend="pyxis", image="nvcr.io#prl")
    words = interactive(["--jobid=8"], SlurmConfig(venv="/v", container=pyxis), RUN, "x", ["-m", "prl"], pty=True)
    assert {"--jobid=8", "--nodelist=x", "--overlap", "--pty", "--container-image=nvcr.io#prl"} <= set(words)
    assert words[words.index("bash") :] == ["bash", f"{RUN}/slurm/node.sh", "/v/bin/python", "-m", "prl"]
    assert "--pty" not in interactive([], SlurmConfig(), RUN, "x", [], pty=False)


@pytest.mark.parametrize(
    ("visible", "first", "count", "left", "refused"),
    [
        ("4,5,6,7", 1, 2, "5,6", ""),
        ("GPU-a,GPU-b", 0, 1, "GPU-a", ""),
        ("4,5", 0, 0, "4,5", ""),
        ("4,5", 1, 2, "4,5", "node9: the job has 2 devices here, and this process was to have 1 to 2"),
        ("", 0, 1, "", "node9: the job has 0 devices here, and this process was to have 0 to 0"),
    ],
)
def test_a_process_sees_its_own_of_the_jobs_devices(
    visible: str, first: int, count: int, left: str, refused: str
) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": visible, "SLURMD_NODENAME": "node9"}
    assert choose(environment, first, count) == refused
    assert environment["CUDA_VISIBLE_DEVICES"] == left


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "12", "SLURM_HET_JOB_ID": "11"}, "11"),
        ({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "12_3"),
    ],
)
def test_a_job_names_itself_and_no_other(monkeypatch: pytest.MonkeyPatch, told: dict[str, str], name: str) -> None:
    for key, value in ({"SLURM_JOB_NODELIST": ""} | told).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(commands, "hostnames", lambda listed: ["a"])
    job = Job.ours()
    assert (job.id, job.ids, job.components) == (name, name, (("a",),))


# --- what nodes say ---------------------------------------------------------------------------------------------------
def probe(host: str, *said: dict[str, Any], clock: float = 0.0) -> Probe:
    now = time.time()
    first = {"time": now + clock, "problems": [], "address": host, "port": 1}
    heard = [(now, first | line) for line in said]
    job = Job(id="1", components=((host,),), restarts=0)
    step = Step(name="", host=host, job=job, popen=subprocess.Popen(["true"]))
    step.popen.wait()
    return attrs.evolve(Probe(step=step, started=now), heard=heard, noise=["srun: error: no route"])


REACHES_ALL: dict[str, Any] = {"unreachable": {}}


@pytest.mark.parametrize(
    ("examined", "problems"),
    [
        (probe("a", {}, REACHES_ALL), []),
        (probe("a", {"problems": ["no plugin"]}), ["no plugin"]),
        (probe("a"), ["did not answer: srun: error: no route"]),
        (probe("a", {}), ["answered only once; then: srun: error: no route"]),
        (
            probe("a", {}, REACHES_ALL, clock=60.4),
            ["its clock is at least 60 s ahead of this node's (launcher.clock_skew = 5)"],
        ),
        (
            probe("a", {}, REACHES_ALL, clock=-31.7),
            ["its clock is at least 32 s behind this node's (launcher.clock_skew = 5)"],
        ),
        (probe("a", {"write": 80.0}, REACHES_ALL | {"read": 20.0, "problems": ["cannot read"]}), ["cannot read"]),
        (
            probe("a", {"write": 9.5}, REACHES_ALL | {"read": 11.0}),
            ["writes the run's folder at 9.5 MB/s (launcher.slowest_files = 10)"],
        ),
    ],
)
def test_a_node_is_judged_by_what_it_says(examined: Probe, problems: list[str]) -> None:
    assert examined.problems(5.0, 10.0) == problems


def test_the_node_that_most_others_cannot_reach_is_to_blame() -> None:
    probes = {
        "a": probe("a", {}, {"unreachable": {"c": "timed out"}}),
        "b": probe("b", {}, {"unreachable": {"c": "timed out"}}),
        "c": probe("c", {}, REACHES_ALL),
        "d": probe("d", {"problems": ["no plugin"]}),
    }
    good = [host for host, examined in probes.items() if not examined.problems(5.0)]
    assert unreachable(probes, good) == {"c": ["a cannot reach c (timed out); see run.network"]}


@pytest.mark.parametrize("bad", ["a", "c", "e"])
def test_neighbours_in_pairs_tell_which_node_it_is(bad: str) -> None:
    pairs = pairs_of(["a", "b", "c", "d", "e"])
    failed = {(host, other): "timed out" for host, other in pairs.values() if bad in (host, other)}
    assert len(failed) == 2
    assert set(blame(failed, ["a", "b", "c", "d", "e"])) == {bad}
    assert pairs_of(["a", "b"]) == {"pair-0": ["a", "b"]}


@pytest.mark.parametrize(
    ("lines", "problems"),
    [
        ("echo '3, 0'; echo '5, 0'", []),
        ("echo '3, 0'; echo '5, 12'", ["device 5 has 12 uncorrected memory errors (ECC)"]),
        ("echo '3, [N/A]'", []),
        ("echo $1 >&2; exit 9", ["nvidia-smi: --id=3,5"]),
    ],
)
def test_a_driver_is_asked_for_the_errors_of_the_jobs_devices(
    lines: str, problems: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text(f"#!/bin/sh\n{lines}\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert devices(2) == problems
    assert devices(3) == ["has 2 devices for this job, and the plan needs 3"]


def test_room_is_asked_of_the_nearest_folder_there_is(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tale"
    assert disk.no_room(run, 0.001) == ""
    assert list(tmp_path.iterdir()) == []
    assert f"{tmp_path} has " in disk.no_room(run, 1e9)
    assert f"cannot write into {Path('/proc')}: " in disk.no_room(Path("/proc/runs/tale"), 0.0)


def test_what_a_neighbour_wrote_is_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "node.data"
    assert disk.write(file) > 0
    assert disk.read(file) > 0
    file.write_bytes(b"cut short")
    with pytest.raises(OSError, match="has 9 of 16777216 bytes here"):
        disk.read(file)


# --- sweeps -----------------------------------------------------------------------------------------------------------
def test_a_sweep_is_a_job_array_over_its_folders() -> None:
    plans = [attrs.evolve(PLAN, run_dir=RunDir(f"/shared/sweep/{name}")) for name in ("0-seed=0", "1-seed=1")]
    lines = script.array(plans, SlurmConfig(venv="/v"), Path("/shared/sweep")).splitlines()
    assert {"#SBATCH --array=0-1", "#SBATCH --job-name=sweep", "#SBATCH --output=/shared/sweep/slurm/%a.log"} <= set(
        lines
    )
    assert lines[-1] == (
        'exec /v/bin/python -m prl_slurm "$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" /shared/sweep/slurm/runs)"'
    )


def test_what_an_array_cannot_be_is_refused() -> None:
    larger = attrs.evolve(PLAN, groups=(GROUPS[0], attrs.evolve(GROUPS[1], nodes=2)))
    with pytest.raises(UserError, match="different nodes"):
        script.array([PLAN, larger], SlurmConfig(), RUN)
    with pytest.raises(UserError, match="heterogeneous job cannot be an array"):
        script.array([PLAN], SlurmConfig(allocation="heterogeneous"), RUN)


# --- the large configs ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["glm5_1", "kimi_k2_7", "nemotron3_ultra"])
def test_the_large_configs_ask_for_28_nodes_of_8_devices(name: str) -> None:
    config = Path(__file__).parents[2] / "configs" / f"{name}_swe_28xh200.toml"
    composition = compose(config, probe=False)
    large = plan(composition, RunDir(RUN))
    lines = script.job(large, cast(SlurmConfig, composition.run.launcher)).splitlines()
    assert {"#SBATCH --nodes=28", "#SBATCH --gres=gpu:8", "#SBATCH --exclusive"} <= set(lines)
    nodes = Nodes.given(large, cast(SlurmConfig, composition.run.launcher), [[f"n{i}" for i in range(28)]])
    agents = [process for process in large.processes if process.role == "trainer"]
    assert [nodes.place(agent).host for agent in agents] == [f"n{i}" for i in range(12, 28)]
    assert {(agent.gpus, agent.first_gpu) for agent in agents} == {(8, 0)}
    assert {group.name: (group.nodes, group.gpus <= 8) for group in large.groups} == {
        "inference": (12, True),
        "trainer": (16, True),
    }
