"""`prl serve`: a version that stays, while the run it is of trains on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import attrs
import openai
import pytest
import torch
from prl.run_dir import RunDir
from transformers import AutoModelForCausalLM

from tests.end_to_end.live import TINY, Launched, launched, prl

QUESTION = [{"role": "user", "content": "Spell this word backward: sun"}]
STEP = 4


@attrs.frozen(kw_only=True)
class Pinned:
    """What a client got from the served checkpoint, while the run went on."""

    run: RunDir
    answers: list[openai.types.chat.ChatCompletion]
    """Before and after the run served newer versions."""
    live: list[str]
    """What the run's own engine said to a request for the pinned version."""
    code: int
    left: list[Path]
    """In the folder where it worked."""


def served(process: subprocess.Popen[str]) -> tuple[str, str, str]:
    """(model, URL, key) as `prl serve` tells them."""
    output: IO[str] = process.stdout  # type: ignore[assignment]
    model, _, url = output.readline().strip().partition(" at ")
    key = output.readline().strip().removeprefix("key in ")
    return model, url, Path(key).read_text()


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> Pinned:
    folder = tmp_path_factory.mktemp("serve")
    config = folder / "tiny.toml"
    config.write_text(TINY)
    slowly = ("scheduler.max_staleness=0", "trackers=[]")  # room on two cores for those who ask
    edits = ("run.steps=100000", f"checkpoints.every={STEP}", "checkpoints.keep_last=0", "evaluation.every=0", *slowly)
    with launched(config, folder / "run", *edits) as run:
        run.until(lambda: (run.dir.checkpoints / f"step-{STEP}").is_dir())
        words = [sys.executable, "-m", "prl", "serve", f"{run.dir.path}@{STEP}"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            model, url, key = served(process)
            assert model == f"qwen3@{STEP}"
            answers = [ask(model, url, key)]
            newer = len(run.rl_steps) + 3
            run.until(lambda: len(run.rl_steps) >= newer)
            answers.append(ask(model, url, key))
            live = refusals(run, model)
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
        assert prl("stop", str(run.dir.path)).returncode == 0
        run.end()
    return Pinned(run=run.dir, answers=answers, live=live, code=code, left=list((run.dir.path / "serving").iterdir()))


def ask(model: str, url: str, key: str) -> openai.types.chat.ChatCompletion:
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60) as client:
        answer: openai.types.chat.ChatCompletion = client.chat.completions.create(
            model=model,
            messages=QUESTION,  # type: ignore[arg-type]
            max_tokens=12,
            temperature=0,
            logprobs=True,
            extra_body={"return_token_ids": True},
        )
    return answer


def said(answer: openai.types.chat.ChatCompletion) -> tuple[list[int], torch.Tensor]:
    """Ids and log-probabilities of its tokens: [T]."""
    (choice,) = answer.choices
    content = choice.logprobs.content  # type: ignore[union-attr]
    return choice.model_extra["token_ids"], torch.tensor([entry.logprob for entry in content])  # type: ignore[index,union-attr]


def refusals(run: Launched, model: str) -> list[str]:
    (engine,) = run.state["engines"]
    with pytest.raises(openai.NotFoundError) as caught:
        ask(model, f"{engine}/v1", run.dir.token())
    return [str(caught.value)]


def test_the_answer_is_the_checkpoint_s_and_stays(pinned: Pinned) -> None:
    first, second = pinned.answers
    assert first.model == f"qwen3@{STEP}"
    # Of the second answer the prompt was in the cache: one row was computed instead of all, which rounds differently.
    assert said(first)[0] == said(second)[0]
    torch.testing.assert_close(said(first)[1], said(second)[1], atol=1e-5, rtol=0)
    model = AutoModelForCausalLM.from_pretrained(pinned.run.checkpoints / f"step-{STEP}" / "huggingface")
    prompt = first.model_extra["prompt_token_ids"]  # type: ignore[index]
    tokens, logprobs = said(first)
    with torch.no_grad():
        rows = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].log_softmax(1)
    assert rows.argmax(1).tolist() == tokens
    torch.testing.assert_close(logprobs, rows.max(1).values, atol=1e-4, rtol=0)


def test_the_run_s_own_engine_has_moved_on_and_says_so(pinned: Pinned) -> None:
    (sentence,) = pinned.live
    assert f"version {STEP} is not served here; this engine serves qwen3@" in sentence
    assert "`prl serve RUN@STEP` serves a version of which there is a checkpoint" in sentence


def test_it_ends_when_told_to_and_leaves_nothing(pinned: Pinned) -> None:
    assert (pinned.code, pinned.left) == (0, [])


def test_a_step_without_a_checkpoint_is_refused_with_those_there_are(pinned: Pinned) -> None:
    refused = prl("serve", f"{pinned.run.path}@{STEP + 1}")
    assert refused.returncode == 2
    assert f"has no checkpoint of step {STEP + 1}; there are {STEP}, {2 * STEP}" in refused.stderr
