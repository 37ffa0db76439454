"""The main job with vLLM in the place of the embedded engine: it learns, versions change in flight, nothing is lost."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.end_to_end.live import ROOT, TINY, Launched, launched, prl
from tests.plugins.served_vllm import needs_vllm

pytestmark = needs_vllm
WARMUP, STEPS = 110, 50
PATIENCE = 1500.0
JOB = ROOT / "configs" / "spell_backward.toml"
EDITS = (
    'engine.type="vllm"',
    "engine.sequences=128",
    "environments.0.parameters.max_word_len=3",
    f"warmup.steps={WARMUP}",
    f"run.steps={STEPS}",
    "evaluation.every=25",
    "evaluation.tasks=400",
)
"""Words of three letters: fifty steps teach 0.05 to 0.1 of the tasks more."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder: Path = tmp_path_factory.mktemp("vllm_job") / "run"
    with launched(JOB, folder, *EDITS, words=("--plugins", "vllm")) as run:
        code, output = run.end(PATIENCE)
    assert code == 0, output
    return run


def test_it_learns_beyond_the_warm_up(job: Launched) -> None:
    accuracy = [line["eval/spell_backward/accuracy"] for line in job.lines if line["phase"] == "eval"]
    assert accuracy[-1] > accuracy[0] + 0.02


def test_tokens_are_sampled_across_updates_and_no_request_is_lost(job: Launched) -> None:
    audit = prl("audit", str(job.dir.path))
    assert audit.returncode == 0, audit.stdout
    assert max(line["staleness/max"] for line in job.rl_steps) == 1
    assert any(len(rollout["versions"]) > 1 for rollout in job.rollouts)
    assert [line["step"] for line in job.steps] == list(range(1, WARMUP + STEPS + 1))


def test_engine_and_trainer_agree_on_fresh_tokens(job: Launched) -> None:
    """Exactly where all are; a few may have been sampled on keys and values from before an update (`on_update`)."""
    fresh = [line["mismatch/k3_fresh"] for line in job.lines if "mismatch/k3_fresh" in line]
    assert min(fresh) < 1e-10
    assert max(fresh) < 1e-4


# --- the server dies in the middle ------------------------------------------------------------------------------------
def test_a_server_that_is_killed_is_replaced_and_catches_up(tmp_path: Path) -> None:
    """The run waits for its only engine: nothing is lost and no version skipped for good."""
    import psutil  # comes with vLLM

    config = tmp_path / "tiny.toml"
    config.write_text(TINY)
    edits = ('engine.type="vllm"', "model.head_dim=32", "run.steps=8", "evaluation.every=0")
    with launched(config, tmp_path / "run", *edits, words=("--plugins", "vllm")) as run:
        run.until(lambda: len(run.rl_steps) >= 2, PATIENCE)
        (server,) = psutil.Process(run.pid("engine")).children()
        server.kill()
        code, output = run.end(PATIENCE)
    assert code == 0, output
    assert prl("audit", str(run.dir.path)).returncode == 0
    assert (run.state["status"], run.state["step"]) == ("finished", run.state["steps"])
    with closing(sqlite3.connect(run.dir.ledger)) as ledger:
        events = [
            event for (event,) in ledger.execute("SELECT event FROM engines WHERE event != 'committed' ORDER BY rowid")
        ]
    assert events == ["joined", "left", "joined"]
