"""The processes a run consists of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prl.compose import describe
from prl.compose.compose import Composition, compose
from prl.compose.plan import NodeGroup, plan, replay_plan
from prl.errors import ConfigError
from prl.run_dir import RunDir

Throwaway = Callable[..., Path]


def test_every_role_with_its_count_and_threads(toy_config: Path, tmp_path: Path) -> None:
    overrides = ["engine.count=2", "rollouts.workers=3", "trainer.ranks=2", "trainer.threads=4"]
    processes = plan(compose(toy_config, overrides=overrides), RunDir(tmp_path)).processes
    assert [process.name for process in processes] == [
        "controller-0",
        "engine-0",
        "engine-1",
        "environment-0",
        "environment-1",
        "environment-2",
        "trainer-0",
    ]
    assert processes[2].argv == (
        *(sys.executable, "-m", "prl", "worker"),
        *("--run", str(tmp_path), "--role", "engine", "--index", "1"),
    )
    assert {process.env["OMP_NUM_THREADS"] for process in processes[:-1]} == {"1"}
    assert processes[-1].env == {"OMP_NUM_THREADS": "4", "PYTHONHASHSEED": "0"}
    assert (processes[-1].cpus, processes[-1].gpus) == (8, 0)


def test_a_run_on_cuda_asks_for_devices(toy_config: Path, tmp_path: Path) -> None:
    processes = plan(compose(toy_config, overrides=["trainer.device=cuda", "trainer.ranks=2"]), RunDir(tmp_path))
    assert {p.name: p.gpus for p in processes.processes} == {
        "controller-0": 0,
        "engine-0": 1,
        "environment-0": 0,
        "trainer-0": 2,
    }


def test_cheap_environments_need_no_process(toy_config: Path, throwaway_plugin: Throwaway, tmp_path: Path) -> None:
    throwaway_plugin(
        "light",
        """
        import attrs
        from prl import hookimpl
        from prl.compose.config import EnvironmentConfig
        from prl.providers import Environment

        @attrs.frozen(kw_only=True)
        class Config(EnvironmentConfig):
            pass

        @hookimpl
        def prl_environments():
            return [Environment(name="light", config=Config, summary="", build="x:y", cheap=True)]
        """,
    )
    light = ["environments.0.type=light"]
    assert roles(compose(toy_config, plugins="light", overrides=light), tmp_path) == ["controller", "engine", "trainer"]
    apart = compose(toy_config, plugins="light", overrides=[*light, "environments.0.runs_in=workers"])
    assert roles(apart, tmp_path) == ["controller", "engine", "environment", "trainer"]


def test_a_config_may_know_that_an_environment_is_cheap(toy_config: Path, tmp_path: Path) -> None:
    composition = compose(toy_config, overrides=["environments.0.runs_in=controller"])
    assert roles(composition, tmp_path) == ["controller", "engine", "trainer"]


def roles(composition: Composition, folder: Path) -> list[str]:
    return [process.role for process in plan(composition, RunDir(folder)).processes]


def test_a_replay_is_the_trainer_and_who_is_in_charge_of_it(toy_config: Path, tmp_path: Path) -> None:
    composition = compose(toy_config, overrides=["engine.count=2", "trainer.ranks=2"])
    in_charge, trainer = replay_plan(composition, RunDir(tmp_path)).processes
    assert in_charge.role == "controller"
    assert in_charge.argv[-4:] == ("--role", "replay", "--index", "0")
    assert trainer == plan(composition, RunDir(tmp_path)).processes[-1]


def test_nodes_of_two_kinds_and_what_each_must_offer(toy_config: Path, tmp_path: Path) -> None:
    overrides = ["engine.count=4", "engine.nodes=2", "rollouts.workers=3"]
    overrides += ["trainer.ranks=8", "trainer.nodes=2", "trainer.threads=3", "trainer.device=cuda"]
    whole = plan(compose(toy_config, overrides=overrides), RunDir(tmp_path))
    assert whole.groups == (
        NodeGroup(name="inference", nodes=2, cpus=5, gpus=2),
        NodeGroup(name="trainer", nodes=2, cpus=12, gpus=4),
    )
    assert {p.name: (p.group, p.node, p.first_gpu, p.gpus, p.announced) for p in whole.processes} == {
        "controller-0": ("inference", 0, 0, 0, "controller.json"),
        "engine-0": ("inference", 0, 0, 1, "hello"),
        "engine-1": ("inference", 0, 1, 1, "hello"),
        "engine-2": ("inference", 1, 0, 1, "hello"),
        "engine-3": ("inference", 1, 1, 1, "hello"),
        "environment-0": ("inference", 0, 0, 0, ""),
        "environment-1": ("inference", 1, 0, 0, ""),
        "environment-2": ("inference", 0, 0, 0, ""),
        "trainer-0": ("trainer", 0, 0, 4, "rendezvous.json"),
        "trainer-1": ("trainer", 1, 0, 4, ""),
    }
    assert [p.name for p in whole.on("inference", 1)] == ["engine-2", "engine-3", "environment-1"]


def test_a_plan_as_text(toy_config: Path, tmp_path: Path) -> None:
    overrides = ["engine.count=2", "trainer.ranks=4", "trainer.nodes=2", "trainer.device=cuda"]
    whole = plan(compose(toy_config, overrides=overrides), RunDir(tmp_path))
    assert describe.groups(whole)[1:] == [
        ["inference", "1", "4", "2", "1 controller, 2 engine, 1 environment"],
        ["trainer", "2", "2", "2", "1 trainer"],
    ]
    assert describe.processes(whole)[2:] == [
        ["engine-0", "inference 0", "1", "0", "hello"],
        ["engine-1", "inference 0", "1", "1", "hello"],
        ["environment-0", "inference 0", "1", "-", "-"],
        ["trainer-0", "trainer 0", "2", "0-1", "rendezvous.json"],
        ["trainer-1", "trainer 1", "2", "0-1", "-"],
    ]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["trainer.ranks=3", "trainer.nodes=2"], r"trainer.ranks\s+must be a multiple of trainer.nodes \(2\), got 3"),
        (["engine.nodes=2"], r"engine.nodes\s+must be <= engine.count \(1\), got 2"),
    ],
)
def test_what_cannot_be_spread_is_refused(toy_config: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        compose(toy_config, overrides=overrides)
