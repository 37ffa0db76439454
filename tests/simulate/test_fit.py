"""Assumptions from a record: what is in it is found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from prl.compose.config import RolloutSection
from prl.errors import UserError
from prl.run_dir import RunDir
from prl.simulate import fit
from prl.simulate.assumptions import Assumptions
from prl.simulate.cluster import Cluster
from prl.simulate.figures import Figures
from prl.simulate.loop import Simulation
from prl.simulate.workload import EmpiricalLengths, LognormalSeconds, Workload
from prl_bounded_staleness.scheduler import BoundedStaleness

from tests.ledger.histories import arrivals, write

GROUPS = ((10, 20, 30), (100, 200, 300), (50, 60))


def metrics(step: int, **changes: Any) -> dict[str, Any]:
    """Half of a step the trainer waited; it computes 1 ms for each token, and one second besides."""
    return {
        "step": step,
        "phase": "rl",
        "time/step": 2.0 + 0.2 * step,
        "tokens/sampled": 100 * step,
        "time/forward_backward": 0.1 * step,
        "idle/trainer": 0.5,
        "idle/engine": 0.25,
        "staleness/mean": 0.5,
        "time/publish": 0.3,
        **changes,
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    rows = [
        metrics(1, **{"time/step": 900.0}),  # start-up
        metrics(2),
        metrics(3),
        metrics(4, **{"time/step": 900.0}),  # repeated by a resumed attempt
        metrics(4),
        {"step": 4, "phase": "eval", "eval/version": 4},
        metrics(5, phase="warmup"),
    ]
    run.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": 6, "ph')
    write(run.ledger, arrivals(GROUPS))
    return run


def test_reading_a_record(run_dir: RunDir) -> None:
    recorded = fit.read(run_dir)
    assert recorded.steps == 3
    assert recorded.groups == GROUPS
    assert (recorded.step_base, recorded.step_per_token) == (pytest.approx(1.0), pytest.approx(0.001))
    assert recorded.tokens_per_second == pytest.approx(900 / 7.8)
    assert recorded.engine_seconds_per_token == pytest.approx(0.75 * 7.8 / 900)
    assert (recorded.idle_trainer, recorded.idle_engine, recorded.publish) == (0.5, 0.25, 0.3)


def test_too_little_of_a_record_is_refused(run_dir: RunDir) -> None:
    run_dir.ledger.unlink()
    with pytest.raises(UserError, match="3 usable rl steps and 0 groups"):
        fit.read(run_dir)
    run_dir.metrics.write_text("")
    with pytest.raises(UserError, match="0 usable rl steps"):
        fit.read(run_dir)


def simulated(assumptions: Assumptions) -> Figures:
    """A run of one engine, eight groups of three a step, one step ahead."""
    simulation = Simulation(
        lambda clock: BoundedStaleness(max_staleness=1, groups_per_step=8),
        rollouts=RolloutSection(groups_per_step=8, group_size=3),
        workload=Workload(
            lengths=EmpiricalLengths(groups=GROUPS), latency=LognormalSeconds(mean=0.0, sigma=0.0), failure=0.0
        ),
        cluster=Cluster(
            engines=1,
            slots=16,
            decode_base=assumptions.decode_base,
            decode_per_sequence=assumptions.decode_per_sequence,
            step_base=assumptions.step_base,
            step_per_token=assumptions.step_per_token,
            publish=assumptions.publish,
        ),
        steps=40,
    )
    simulation.run()
    return simulation.figures()


@pytest.mark.parametrize("guess", [0.001, 0.02, 1.0])
def test_the_speed_of_the_engines_is_found_again(run_dir: RunDir, guess: float) -> None:
    truth = Assumptions(decode_base=0.02, decode_per_sequence=0.002, step_base=1.0, step_per_token=0.001, publish=0.3)
    figures = simulated(truth)
    recorded = attrs.evolve(fit.read(run_dir), engine_seconds_per_token=figures.engine_seconds_per_token)
    assumed = Assumptions(decode_base=guess, decode_per_sequence=guess / 10)
    fitted, again = fit.fit(recorded, assumed, group_size=3, simulate=simulated)
    assert fitted.decode_base == pytest.approx(0.02, rel=0.02)
    assert fitted.decode_per_sequence == pytest.approx(0.002, rel=0.02)
    assert (fitted.step_base, fitted.step_per_token) == (pytest.approx(1.0), pytest.approx(0.001))
    assert (fitted.publish, fitted.recorded) == (0.3, GROUPS)
    assert fitted.failure == pytest.approx(1 / 9)  # the third group has two of three
    assert again.tokens_per_second == pytest.approx(figures.tokens_per_second, rel=0.05)
