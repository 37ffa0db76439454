"""The processes a run consists of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from prl.compose.compose import compose
from prl.compose.plan import plan, replay_plan
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
    composition = compose(toy_config, plugins="light", overrides=["environments.0.type=light"])
    assert [p.role for p in plan(composition, RunDir(tmp_path)).processes] == ["controller", "engine", "trainer"]


def test_a_replay_is_the_trainer_and_who_is_in_charge_of_it(toy_config: Path, tmp_path: Path) -> None:
    composition = compose(toy_config, overrides=["engine.count=2", "trainer.ranks=2"])
    in_charge, trainer = replay_plan(composition, RunDir(tmp_path)).processes
    assert in_charge.role == "controller"
    assert in_charge.argv[-4:] == ("--role", "replay", "--index", "0")
    assert trainer == plan(composition, RunDir(tmp_path)).processes[-1]
