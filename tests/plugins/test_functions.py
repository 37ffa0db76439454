"""A user's own rewards: rows and functions are checked first, held-out prompts stay out, failures stay failures."""

from __future__ import annotations

import asyncio
import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from prl.errors import InfrastructureError, UserError
from prl.providers import Score
from prl.types import Split
from prl_functions import FunctionsConfig
from prl_functions.environment import Functions, build
from prl_functions.reward import RewardFunction
from prl_functions.rows import Row, read, split_by_hash

REWARDS = """
    import dataclasses

    @dataclasses.dataclass
    class Note:
        text: str

    def exact(completion, answer):
        return float(completion == answer)

    async def graded(completion, answer, *, scale=1.0, **row):
        return scale * len(completion), {"length": len(completion), "keys": len(row)}

    def broken(completion):
        raise KeyError("no such thing")

    def returns(completion, what):
        return {"text": "1.0", "nan": float("nan"), "none": None, "bad metric": (1.0, {"x": "y"}), "true": True}[what]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(textwrap.dedent(REWARDS))
    return tmp_path


@pytest.fixture
def rows_of(folder: Path) -> Callable[..., str]:
    """Writes rows to a file and returns its name."""

    def write(*rows: Mapping[str, Any], file: str = "rows.jsonl") -> str:
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return write


def sums(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{n} + {n} =", "answer": str(2 * n)} for n in range(count)]


def environment(**settings: Any) -> Functions:
    return build(FunctionsConfig(**{"file": "rows.jsonl", "reward": "rewards.py:exact", **settings}), seed=0)


def prompts(env: Functions, split: Split) -> list[str]:
    return [env.task(split, index).messages[-1]["content"] for index in range(env.size(split))]


class Conversation:
    """One scripted reply."""

    def __init__(self, reply: str) -> None:
        self.state: dict[str, Any] = {}
        self._reply = reply

    async def ask(self, messages: Any) -> Any:
        return {"role": "assistant", "content": self._reply}


def rewarded(env: Functions, index: int, *replies: str) -> list[Score]:
    async def scenario() -> list[Score]:
        task = env.task("train", index)
        conversations: list[Any] = [Conversation(reply) for reply in replies]
        for conversation in conversations:
            await env.rollout(task, conversation)
        return list(await env.score(task, conversations))

    return asyncio.run(scenario())


def called(reference: str, completion: str, **values: Any) -> Score:
    row = Row(file="rows.jsonl", line=3, values={"prompt": "x", **values}, messages=())
    return asyncio.run(RewardFunction(reference)(completion, row))


def test_replies_are_rewarded_by_the_users_function(rows_of: Callable[..., str]) -> None:
    rows_of(*sums(20))
    env = environment()
    answer = env.task("train", 0).data["row"].values["answer"]
    assert rewarded(env, 0, answer, "no") == [
        Score(reward=1.0, metrics={"accuracy": 1.0}),
        Score(reward=0.0, metrics={"accuracy": 0.0}),
    ]


def test_async_functions_and_metrics(folder: Path) -> None:
    score = called("rewards.py:graded", "four", answer="4", scale=0.25, level=3)
    assert score == Score(reward=1.0, metrics={"accuracy": 1.0, "length": 4.0, "keys": 2.0})


def test_functions_of_an_installed_module(folder: Path) -> None:
    assert called("os.path:exists", "rewards.py") == Score(reward=1.0, metrics={"accuracy": 1.0})


def test_held_out_prompts_are_never_trained_and_equal_ones_stay_together(rows_of: Callable[..., str]) -> None:
    rows_of(*sums(200), *({**row, "source": "again"} for row in sums(200)))
    env = environment(eval_share=0.25)
    train, held_out = prompts(env, "train"), prompts(env, "eval")
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 400
    assert 60 <= len(held_out) <= 140
    assert all(held_out.count(prompt) == 2 for prompt in held_out)


def test_adding_rows_moves_none_between_splits(rows_of: Callable[..., str]) -> None:
    rows_of(*sums(100))
    before = set(prompts(environment(), "eval"))
    rows_of(*sums(150))
    assert before <= set(prompts(environment(), "eval"))


def test_something_is_held_out_of_a_small_file_and_nothing_when_asked(rows_of: Callable[..., str]) -> None:
    rows_of(*sums(2))
    assert (environment(eval_share=0.001).size("train"), environment(eval_share=0.001).size("eval")) == (1, 1)
    assert (environment(eval_share=0.0).size("train"), environment(eval_share=0.0).size("eval")) == (2, 0)


def test_a_file_of_its_own_is_held_out_of_the_other(rows_of: Callable[..., str]) -> None:
    rows_of(*sums(10))
    rows_of(*sums(3), file="held_out.jsonl")
    env = environment(eval_file="held_out.jsonl")
    assert prompts(env, "eval") == ["0 + 0 =", "1 + 1 =", "2 + 2 ="]
    assert prompts(env, "train") == [f"{n} + {n} =" for n in range(3, 10)]


def test_repeated_rows_count_once_and_blank_lines_not_at_all(folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "a"}\n  {"prompt": "b"}  \n')
    assert [(row.values["prompt"], row.line) for row in read("rows.jsonl")] == [("a", 1), ("b", 4)]


def test_messages_open_the_conversation_as_they_are(rows_of: Callable[..., str]) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    rows_of({"messages": messages, "answer": "hi"})
    assert list(environment(eval_share=0.0).task("train", 0).messages) == messages


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": "4"}, "4"),
        ({"answer": 4}, "4"),
        ({"answer": "4", "demonstration": "four"}, "four"),
        ({"answer": [4]}, None),
    ],
)
def test_demonstrations(rows_of: Callable[..., str], row: dict[str, Any], said: str | None) -> None:
    rows_of({"prompt": "2 + 2", **row})
    env = environment(eval_share=0.0)
    messages = env.demonstration(env.task("train", 0))
    assert (messages[-1] if messages else None) == (said and {"role": "assistant", "content": said})


# --- mistakes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{'prompt': 1}", "rows.jsonl, line 2: not JSON"),
        ("[1]", "rows.jsonl, line 2: expected an object, got list"),
        ('{"question": "x"}', "line 2: needs exactly one of 'prompt' and 'messages', has neither, but 'question'"),
        ('{"prompt": "x", "messages": []}', "line 2: needs exactly one of 'prompt' and 'messages', has both"),
        ('{"prompt": 3}', "line 2: 'prompt' must be a string, got 3"),
        ('{"messages": [{"role": "user"}]}', "line 2: 'messages' must be a list"),
        ('{"prompt": "x", "completion": "y"}', "line 2: the key 'completion' is taken"),
        (
            '{"prompt": "x", "anwser": "y"}',
            "line 2: has no 'answer', which the reward function rewards.py:exact asks for",
        ),
    ],
)
def test_bad_lines_are_named(folder: Path, line: str, sentence: str) -> None:
    (folder / "rows.jsonl").write_text('{"prompt": "fine", "answer": "1"}\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        environment(eval_share=0.0)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("rewards.py", 'expected "package.module:function"'),
        ("reward.py:exact", "there is no file 'reward.py'"),
        ("rewards.py:exakt", "rewards.py has no function 'exakt' (did you mean 'exact'?)"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
        ("syntax.py:f", "cannot be imported: SyntaxError"),
        ("raises.py:f", "raises.py:1)"),
    ],
)
def test_functions_that_cannot_be_found(folder: Path, reference: str, sentence: str) -> None:
    (folder / "syntax.py").write_text("def f(:\n")
    (folder / "raises.py").write_text("x = 1 / 0\n")
    with pytest.raises(UserError) as caught:
        RewardFunction(reference)
    assert sentence in str(caught.value)


def test_missing_files_and_empty_splits(rows_of: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"cannot read 'rows.jsonl' \(from .*\): No such file"):
        environment()
    rows_of(*sums(3))
    rows_of(*sums(3), file="held_out.jsonl")
    with pytest.raises(UserError, match=r"rows.jsonl leaves no rows to train on \(3 in all\)"):
        environment(eval_file="held_out.jsonl")


def test_a_function_that_raises_is_an_infrastructure_failure(folder: Path) -> None:
    with pytest.raises(InfrastructureError) as caught:
        called("rewards.py:broken", "x")
    sentence = str(caught.value)
    assert sentence.startswith(
        "reward function rewards.py:broken failed on rows.jsonl, line 3: KeyError: 'no such thing'"
    )
    assert "rewards.py:15)" in sentence


@pytest.mark.parametrize("what", ["text", "nan", "none", "bad metric"])
def test_what_is_no_number_is_no_reward(folder: Path, what: str) -> None:
    with pytest.raises(InfrastructureError, match=r"rewards.py:returns returned .* on rows.jsonl, line 3; expected"):
        called("rewards.py:returns", "x", what=what)


def test_truth_is_a_number(folder: Path) -> None:
    assert called("rewards.py:returns", "x", what="true").reward == 1.0


def test_one_failing_reply_fails_alone(folder: Path, rows_of: Callable[..., str]) -> None:
    """The reward is computed inside the rollout, which the runner isolates; `score` only collects."""
    (folder / "picky.py").write_text("def picky(completion):\n    return 1.0 / len(completion)\n")
    rows_of(*sums(1))
    env = environment(reward="picky.py:picky", eval_share=0.0)
    with pytest.raises(InfrastructureError, match="ZeroDivisionError"):
        rewarded(env, 0, "")
    assert rewarded(env, 0, "ab")[0].reward == 0.5


def test_split_by_hash_depends_on_content_alone(rows_of: Callable[..., str]) -> None:
    rows = read(rows_of(*sums(50)))
    forwards, backwards = split_by_hash(rows, 0.3), split_by_hash(rows[::-1], 0.3)
    assert {row.line for row in forwards["eval"]} == {row.line for row in backwards["eval"]}
