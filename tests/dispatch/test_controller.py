"""Whole runs of the controller around fake workers."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from prl.run_dir import read_json

from tests.dispatch.fakes import FakeRun, toy_run


def lines(run: FakeRun, phase: str | None = None) -> list[dict]:
    rows = [json.loads(line) for line in run.run_dir.metrics.read_text().splitlines()]
    return [row for row in rows if phase in (None, row["phase"])]


def test_a_run_trains_every_step_and_finishes(tmp_path):
    run = FakeRun(tmp_path, toy_run(steps=4))
    run.go()
    state = read_json(run.run_dir.state)
    assert (state["status"], state["step"], state["steps"], state["error"]) == ("finished", 4, 4, "")
    print(state, lines(run)[-1])
