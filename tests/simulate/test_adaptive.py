"""The scheduler `adaptive` in a simulation: engines whose slots are far fewer than staleness would fill."""

from __future__ import annotations

from pathlib import Path

from prl.compose.compose import Composition, compose
from prl.simulate.assumptions import Assumptions
from prl.simulate.figures import Figures
from prl.simulate.run import simulate

CONFIG = Path(__file__).parents[2] / "configs" / "spell_backward.toml"
ROLLOUTS = ("rollouts.groups_per_step=8", "rollouts.group_size=4", "rollouts.max_tokens=80", "engine.count=2")
ASSUMED = Assumptions(
    length_mean=40.0, slots=16, decode_base=0.05, decode_per_sequence=0.001, step_base=0.5, step_per_token=0.0
)


def composed(*scheduler: str) -> Composition:
    return compose(CONFIG, plugins="adaptive", overrides=[*ROLLOUTS, *(f"scheduler.{edit}" for edit in scheduler)])


def figures(*scheduler: str) -> Figures:
    return simulate(composed(*scheduler), ASSUMED, steps=60)


def test_few_wait_for_a_slot_and_no_speed_is_lost() -> None:
    """8 groups of 4 have room on two engines of 16 slots; a bound of 7 lets 64 of them in."""
    bounded = figures("max_staleness=7")
    adaptive = figures("type=adaptive", "within.type=bounded_staleness", "within.max_staleness=7")
    assert (bounded.queues["running"] > 50, bounded.queues["slots"] > 160, bounded.dropped["stale"] > 0) == (True,) * 3
    assert adaptive.queues["running"] < 14
    assert adaptive.queues["slots"] < 8
    assert adaptive.dropped == {}
    assert adaptive.tokens_per_second > 0.98 * bounded.tokens_per_second
