"""Runs of many processes: every count above one, a third party's loss, a user's reward; and processes that die.

No restart is allowed here: what restarts do is in test_chaos.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.live import ROOT, TINY, Launched, launched

RANKS = 2
MANY = (
    f"trainer.ranks={RANKS}",
    "engine.count=2",
    "rollouts.workers=2",
    "rollouts.sequence_length=192",
    'weights={type="nccl"}',
    'environments=[{type="guessing", maximum=6, guesses=3}]',
    'tokenizer.characters="\\n 0123456789abcdefghijklmnopqrstuvwxyz"',
    "checkpoints.every=1",
    "run.steps=1000",
    "failures.restarts=0",
)
CISPO = ('losses.rl={type="cispo", clip_high=1.5}', "run.steps=1000", "failures.restarts=0")
PROMPTS = [{"prompt": f"spell {word}", "answer": word} for word in ("one", "two", "three", "four", "five", "six") * 4]
REWARD = """
def vowels(completion: str, answer: str) -> float:
    return sum(completion.count(vowel) for vowel in "aeiou") / (1 + len(answer))
"""


@attrs.frozen
class Death:
    """A run of which one process was killed."""

    run: Launched
    code: int
    errors: str
    left: dict[int, list[str]]


def kill_once_trained(run: Launched, role: str) -> Death:
    """SIGKILL a process of that role when three rl steps are done, and see the run end."""
    run.until(lambda: len(run.rl_steps) >= 3)
    os.kill(run.pid(role), signal.SIGKILL)
    code, errors = run.end()
    return Death(run=run, code=code, errors=errors, left=run.processes())


@pytest.fixture(scope="module")
def cispo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed contrib/prl-cispo, as it would into site-packages."""
    target = tmp_path_factory.mktemp("site")
    alone = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    install = [sys.executable, "-m", "pip", "install", *alone, "--target", str(target), f"{ROOT}/contrib/prl-cispo"]
    subprocess.run(install, check=True)
    return target


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory, cispo: Path) -> Iterator[dict[str, Death]]:
    """Two runs at the same time, by the role of the process that is killed in them."""
    folder = tmp_path_factory.mktemp("deaths")
    path = os.pathsep.join([str(cispo), os.environ.get("PYTHONPATH", "")])
    with (
        launched(many(folder), folder / "many", *MANY) as rank_dies,
        launched(
            functions(folder), folder / "functions", *CISPO, words=("--plugins", "cispo"), env={"PYTHONPATH": path}
        ) as engine_dies,
    ):
        yield {
            "engine": kill_once_trained(engine_dies, "engine"),
            "trainer-rank": kill_once_trained(rank_dies, "trainer-rank"),
        }


@pytest.fixture(scope="module")
def rank_killed(deaths: dict[str, Death]) -> Death:
    """Several of everything, conversations of several turns, weights over process groups; then a trainer rank dies."""
    return deaths["trainer-rank"]


@pytest.fixture(scope="module")
def engine_killed(deaths: dict[str, Death]) -> Death:
    """A user's reward under a third party's loss; then the engine dies."""
    return deaths["engine"]


def many(folder: Path) -> Path:
    config = folder / "many.toml"
    config.write_text(TINY.replace("extends", 'plugins = ["guessing", "nccl"]\nextends'))
    return config


def functions(folder: Path) -> Path:
    (folder / "rewards.py").write_text(REWARD)
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in PROMPTS))
    source = f'file = "{folder}/prompts.jsonl"\nreward = "{folder}/rewards.py:vowels"'
    environment = f'[[environments]]\ntype = "functions"\nname = "vowels"\n{source}\n'
    config = folder / "functions.toml"
    config.write_text(TINY.replace("extends", 'plugins = ["functions"]\nextends') + environment)
    return config


# --- several of everything --------------------------------------------------------------------------------------------
def test_conversations_of_several_turns_are_trained_on_by_several_ranks(rank_killed: Death) -> None:
    rollouts = rank_killed.run.rollouts
    turns = {sum(message["role"] == "assistant" for message in rollout["messages"]) for rollout in rollouts}
    assert max(turns) > 1
    for rollout in rollouts:
        assert len(rollout["stop"]) == sum(message["role"] == "assistant" for message in rollout["messages"])
        assert sum(rollout["version_tokens"]) == rollout["length"]
    fresh = [line["mismatch/k3_fresh"] for line in rank_killed.run.rl_steps if "mismatch/k3_fresh" in line]
    assert max(fresh) < 1e-8
    assert max(line["staleness/max"] for line in rank_killed.run.rl_steps) <= 2


def test_a_checkpoint_of_several_ranks_holds_the_whole_policy(rank_killed: Death) -> None:
    checkpoints = rank_killed.run.dir.checkpoints
    newest = max((int(path.name.removeprefix("step-")), path) for path in checkpoints.glob("step-*[0-9]"))[1]
    shards = [load_file(newest / "trainer" / f"rank-{rank}.safetensors") for rank in range(RANKS)]
    name = "model/embed_tokens.weight"
    shares = [load_file(file) for file in (newest / "huggingface").glob("*.safetensors")]
    assert len(shares) == RANKS
    (whole,) = (share["model.embed_tokens.weight"] for share in shares if "model.embed_tokens.weight" in share)
    assert torch.equal(torch.cat([shard[name] for shard in shards]), whole)


# --- a third party's loss, a user's reward ----------------------------------------------------------------------------
def test_an_installed_loss_trains(engine_killed: Death) -> None:
    lines = engine_killed.run.rl_steps
    assert all(0 <= line["loss/rl/clipped"] <= 1 for line in lines)
    assert all(line["grad_norm"] >= 0 for line in lines)
    assert max(line["grad_norm"] for line in lines) > 0


def test_a_user_s_function_rewards(engine_killed: Death) -> None:
    rollouts = engine_killed.run.rollouts
    assert {rollout["task"]["environment"] for rollout in rollouts} == {"vowels"}
    answers = {line["prompt"]: line["answer"] for line in PROMPTS}
    for rollout in rollouts:
        question, reply = rollout["messages"]
        vowels = sum(reply["content"].count(vowel) for vowel in "aeiou")
        assert rollout["reward"] == pytest.approx(vowels / (1 + len(answers[question["content"]])))


# --- deaths -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("role", "named"),
    [("trainer-rank", ("trainer-0", "trainer rank 0", "exit code -9")), ("engine", ("engine-0", "SIGKILL"))],
)
def test_a_process_that_dies_ends_a_run_without_restarts_and_is_named(
    deaths: dict[str, Death], role: str, named: tuple[str, ...]
) -> None:
    seen = deaths[role]
    assert seen.code == 1
    state = seen.run.state
    assert state["status"] == "failed"
    for name in named:
        assert name in seen.errors
        assert name in state["error"]
    assert seen.left == {}
