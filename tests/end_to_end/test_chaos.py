"""Twenty processes of one run are killed or stopped at random moments: it goes on as if nothing had happened."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import attrs
import pytest
from prl.run_dir import read_json
from prl.supervise.casualties import Reader

from benchmarks.chaos import KINDS, WARMUP, Chaos, Strike, audit
from tests.end_to_end.live import prl
from tests.listening import needs_proc

pytestmark = needs_proc

GROUPS, SAMPLES = 4, 64  # of a step, as benchmarks/chaos.toml has it
STRIKES = (
    *KINDS,
    *(("engine", signal.SIGKILL), ("environment", signal.SIGKILL)) * 3,
    *(("engine", signal.SIGSTOP), ("environment", signal.SIGSTOP)) * 2,
)
"""Every kind of process, killed and stopped; more often those that are replaced while the run goes on."""


@attrs.frozen
class Ended:
    """A run after its last step."""

    chaos: Chaos
    code: int
    strikes: list[Strike]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder: Path = tmp_path_factory.mktemp("chaos")
    chaos = Chaos(folder=folder, seed=0, edits=["trainer.ranks=1"])
    return Ended(chaos, *chaos.run(STRIKES))


def test_the_run_reaches_its_end(ended: Ended) -> None:
    assert ended.code == 0, ended.chaos.output
    assert len(ended.strikes) == len(STRIKES) == 20
    state = read_json(ended.chaos.dir.state)
    assert (state["status"], state["step"], state["error"]) == ("finished", state["steps"], "")


def test_no_prompt_is_lost_or_repeated(ended: Ended) -> None:
    expected = WARMUP * SAMPLES + ended.chaos.steps * GROUPS
    assert dict(ended.chaos.lost()) == {"trained": expected, "repeated": 0, "given_up": 0}
    code, words = audit(ended.chaos.dir)
    assert code == 0, words


def test_every_step_is_on_record_once(ended: Ended) -> None:
    lines = [json.loads(line) for line in ended.chaos.dir.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if line["phase"] != "eval"] == list(range(1, WARMUP + ended.chaos.steps + 1))


def test_the_policy_is_as_good_as_before_the_first_strike(ended: Ended) -> None:
    """Which was made after the first evaluation; what is learnt in the warm-up is kept without strikes, too."""
    lines = [json.loads(line) for line in ended.chaos.dir.metrics.read_text().splitlines()]
    rewards = [line["eval/next_letter/reward"] for line in lines if line["phase"] == "eval"]
    assert rewards[0] == pytest.approx(rewards[-1], abs=0.02)
    assert rewards[-1] > 0.95


def test_every_kind_of_death_and_hang_was_noticed_and_has_its_sentence(ended: Ended) -> None:
    casualties = Reader(ended.chaos.dir).read()
    assert {casualty.role for casualty in casualties} == {"engine", "environment", "trainer", "controller"}
    sentences = "\n".join(casualty.sentence for casualty in casualties)
    for name in ("engine-", "environment-", "controller-0"):
        assert f"{name}" in sentences
    assert "was ended by SIGKILL" in sentences
    assert "gave no sign of life for 10 s" in sentences
    assert len(ended.chaos.dir.attempts()) == 2 + sum(c.role in ("trainer", "controller") for c in casualties)
    assert casualties[-1].sentence in prl("status", str(ended.chaos.dir.path)).stdout
