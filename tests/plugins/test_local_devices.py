"""Launcher `local`: devices of a machine, divided among the processes that ask for some."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from prl.compose.plan import Process
from prl_local import devices


def process(role: str, gpus: int, index: int = 0) -> Process:
    return Process(role=role, index=index, argv=("true",), env={"A": "b"}, cpus=1, gpus=gpus)


RUN = (process("controller", 0), process("engine", 2), process("engine", 2, 1), process("trainer", 1))


def test_every_process_has_devices_of_its_own() -> None:
    found = devices.divided(RUN, ["3", "4", "5", "6", "7", "8"])
    assert [p.env.get(devices.VISIBLE) for p in found] == [None, "3,4", "5,6", "7"]
    assert all(p.env["A"] == "b" for p in found)


@pytest.mark.parametrize("given", [[], ["0"], ["0", "1", "2", "3"]])
def test_too_few_devices_are_shared_by_all(given: list[str]) -> None:
    assert devices.divided(RUN, given) == RUN


def test_processes_that_take_what_they_find_keep_all_of_it() -> None:
    automatic = (process("controller", 0), process("engine", 0), process("trainer", 0))
    assert devices.divided(automatic, ["0", "1"]) == automatic


def test_what_was_given_to_this_process_is_all_there_is_to_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.VISIBLE, "2,5")
    assert devices.found() == ["2", "5"]
    monkeypatch.setenv(devices.VISIBLE, "")
    assert devices.found() == []


@pytest.mark.parametrize(("script", "expected"), [("echo 0; echo 1", ["0", "1"]), ("echo broken; exit 9", [])])
def test_the_driver_is_asked_where_nothing_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: list[str]
) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text(f"#!/bin/sh\n{script}\n")
    driver.chmod(driver.stat().st_mode | stat.S_IXUSR)
    monkeypatch.delenv(devices.VISIBLE, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert devices.found() == expected


def test_a_machine_without_a_driver_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(devices.VISIBLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.found() == []
