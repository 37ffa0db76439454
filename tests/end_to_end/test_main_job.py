"""The main job, small: launched, watched, talked to and stopped by others; then resumed to its end."""

from __future__ import annotations

import json
from collections import defaultdict

import attrs
import pytest
import torch
from openai import OpenAI
from prl.blocks.context import Context
from prl_qwen3 import Qwen3Config
from prl_qwen3.network import build
from safetensors.torch import load_file

from tests.end_to_end.live import TINY, Launched, Run, launched, prl
from tests.listening import addresses, needs_proc

MAX_STALENESS = 2
GROUPS, MEMBERS, WARMUP, MORE_STEPS = 4, 2, 2, 3
PROMPT = "Spell this word backward (example: sun -> nus): word"
SIZES = Qwen3Config(hidden_size=32, intermediate_size=64, layers=1, heads=2, kv_heads=1, head_dim=16)


@attrs.frozen
class Seen:
    """What was observed while the first half of the run lived."""

    stopped: Run
    resumed: Run
    listening: set[str]
    status: str
    engine: str
    models: list[str]
    reply: str
    codes: dict[str, int]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("main_job")
    config = folder / "tiny.toml"
    config.write_text(TINY)
    codes: dict[str, int] = {}
    with launched(config, folder / "first", "run.steps=2000", "checkpoints.every=50") as first:
        first.until(lambda: len(first.rl_steps) >= 4)
        listening = {address for pid in first.processes() for address in addresses(pid)}
        status = prl("status", str(first.dir.path)).stdout
        models, reply, engine = talk(first)
        codes["stop"] = prl("stop", str(first.dir.path)).returncode
        codes["stopped"], _ = first.end()
    steps = first.state["step"] - WARMUP + MORE_STEPS
    edits = (f"run.steps={steps}", f"checkpoints.resume={first.checkpoint}")
    with launched(first.dir.config, folder / "second", *edits) as second:
        codes["resumed"], _ = second.end()
    return Seen(
        stopped=first,
        resumed=second,
        listening=listening,
        status=status,
        engine=engine,
        models=models,
        reply=reply,
        codes=codes,
    )


def talk(run: Launched) -> tuple[list[str], str, str]:
    """What OpenAI's client gets from the run's engine: models and a reply; and the engine's URL."""
    (engine,) = run.state["engines"]
    with OpenAI(base_url=f"{engine}/v1", api_key=run.dir.token(), max_retries=0, timeout=60) as client:
        models = [model.id for model in client.models.list()]
        answer = client.chat.completions.create(
            model=models[0], messages=[{"role": "user", "content": PROMPT}], max_tokens=5
        )
        assert answer.usage is not None
        assert 1 <= answer.usage.completion_tokens <= 5
        return models, answer.choices[0].message.content or "", engine


def by_step(run: Run) -> dict[int, list[dict]]:
    steps = defaultdict(list)
    for rollout in run.rollouts:
        steps[rollout["step"]].append(rollout)
    return dict(steps)


# --- while it ran -----------------------------------------------------------------------------------------------------
@needs_proc
def test_everything_listens_on_loopback_alone(seen: Seen) -> None:
    assert seen.listening == {"127.0.0.1"}


def test_openai_s_client_talks_to_the_policy_where_status_says(seen: Seen) -> None:
    assert seen.models == ["qwen3"]
    assert isinstance(seen.reply, str)
    assert f"{seen.engine}/v1" in seen.status
    assert str(seen.stopped.dir.path / "token") in seen.status


def test_stopped_from_outside_it_ends_well_with_a_checkpoint(seen: Seen) -> None:
    assert seen.codes["stop"] == seen.codes["stopped"] == 0
    state = seen.stopped.state
    assert (state["status"], state["error"], state["engines"]) == ("stopped", "", [])
    assert state["step"] == seen.stopped.steps[-1]["step"] < state["steps"]
    assert seen.stopped.checkpoint.is_dir()
    assert seen.stopped.processes() == {}


# --- what it left -----------------------------------------------------------------------------------------------------
def test_it_resumes_at_the_next_step_and_finishes(seen: Seen) -> None:
    assert seen.codes["resumed"] == 0
    first, second = seen.stopped, seen.resumed
    assert [line["step"] for line in first.steps + second.steps] == list(range(1, second.state["steps"] + 1))
    assert [line["phase"] for line in first.steps[:WARMUP]] == ["warmup"] * WARMUP
    assert {line["phase"] for line in first.steps[WARMUP:] + second.steps} == {"rl"}
    state = second.state
    assert (state["status"], state["step"], state["error"]) == ("finished", state["steps"], "")


def test_every_task_is_trained_once_across_the_stop(seen: Seen) -> None:
    rollouts = seen.stopped.rollouts + seen.resumed.rollouts
    groups = [rollout["group_id"] for rollout in rollouts if rollout["member"] == "0"]
    assert sorted(groups) == list(range(len(seen.stopped.rl_steps + seen.resumed.rl_steps) * GROUPS))


def test_staleness_occurs_and_is_bounded(seen: Seen) -> None:
    lines = seen.stopped.rl_steps + seen.resumed.rl_steps
    highest = [line["staleness/max"] for line in lines]
    assert 0 < max(highest) <= MAX_STALENESS
    for line in lines:
        shares = [line.get(f"staleness/{k}", 0.0) for k in range(MAX_STALENESS + 1)]
        assert sum(shares) == pytest.approx(1.0)
        assert line["staleness/mean"] == pytest.approx(sum(k * share for k, share in enumerate(shares)))


def test_engine_and_trainer_agree_on_fresh_tokens(seen: Seen) -> None:
    fresh = [line["mismatch/k3_fresh"] for line in seen.stopped.lines if "mismatch/k3_fresh" in line]
    assert fresh
    assert max(fresh) < 1e-8


@pytest.mark.parametrize("which", ["stopped", "resumed"])
def test_metrics_and_rollouts_tell_the_same_story(seen: Seen, which: str) -> None:
    run: Run = getattr(seen, which)
    steps = by_step(run)
    assert list(steps) == [line["step"] for line in run.rl_steps]
    for line in run.rl_steps:
        rollouts = steps[line["step"]]
        assert len(rollouts) == GROUPS * MEMBERS
        for rollout in rollouts:
            assert sum(rollout["version_tokens"]) == rollout["length"] > 0
            assert [message["role"] for message in rollout["messages"]] == ["user", "assistant"]
            assert rollout["versions"] == sorted(set(rollout["versions"]))
        runs = [pair for r in rollouts for pair in zip(r["versions"], r["version_tokens"], strict=True)]
        tokens = sum(count for _, count in runs)
        ages = [(line["step"] - 1 - version, count) for version, count in runs]
        assert line["tokens/sampled"] == tokens
        assert line["staleness/max"] == max(age for age, _ in ages)
        assert line["staleness/mean"] == pytest.approx(sum(age * count for age, count in ages) / tokens)
        assert line["reward/mean"] == pytest.approx(sum(r["reward"] for r in rollouts) / len(rollouts))


def test_evaluations_are_of_the_version_they_were_due_at_or_newer(seen: Seen) -> None:
    evaluations = [line for line in seen.stopped.lines + seen.resumed.lines if line["phase"] == "eval"]
    assert evaluations[0]["eval/version"] == WARMUP
    assert evaluations[-1]["eval/version"] == seen.resumed.state["steps"]
    assert all(line["eval/version"] >= line["step"] for line in evaluations)
    assert all(0 <= line["eval/spell_backward/accuracy"] <= 1 for line in evaluations)


def test_the_run_s_own_config_launches_it_again(seen: Seen) -> None:
    again = prl("launch", str(seen.resumed.dir.config), "--dry-run")
    assert again.returncode == 0
    assert prl("config", "diff", str(seen.stopped.dir.config), str(seen.resumed.dir.config)).returncode == 0


@pytest.mark.parametrize("words", [["status"], ["logs"], ["report"]])
def test_looking_at_it_afterwards(seen: Seen, words: list[str]) -> None:
    shown = prl(*words, str(seen.stopped.dir.path))
    assert shown.returncode == 0
    assert "Traceback" not in shown.stderr


# --- the policy, for others -------------------------------------------------------------------------------------------
def test_transformers_loads_the_policy_and_computes_the_same(seen: Seen) -> None:
    from transformers import AutoModelForCausalLM

    folder = seen.resumed.checkpoint
    theirs = AutoModelForCausalLM.from_pretrained(folder / "huggingface", dtype=torch.float32)
    trained = load_file(folder / "trainer" / "rank-0.safetensors")
    weights = {name.removeprefix("model/"): tensor for name, tensor in trained.items() if name.startswith("model/")}
    ours = build(SIZES, vocab_size=theirs.config.vocab_size)
    ours.load_state_dict(weights)
    tokens = torch.arange(20) % theirs.config.vocab_size
    with torch.no_grad():
        expected = ours.hidden(tokens, Context.packed(torch.tensor([0, 20]))) @ ours.head().T
        logits = theirs(tokens[None]).logits[0]
    assert torch.allclose(logits, expected, atol=5e-6, rtol=0)


def test_the_policy_was_trained(seen: Seen) -> None:
    """The export is of this step's weights, not of those the run began with."""
    first, second = (
        load_file(run.checkpoint / "huggingface" / "model.safetensors") for run in (seen.stopped, seen.resumed)
    )
    name = "model.embed_tokens.weight"
    assert first[name].shape == second[name].shape
    assert not torch.equal(first[name], second[name])
    config = json.loads((seen.resumed.checkpoint / "huggingface" / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("qwen3", "float32")
