"""Procedural tasks: splits that never meet, the same in every process, scored by the package; mistakes are named."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from prl.errors import UserError
from prl.types import Split, Task
from prl_reasoning_gym import Family, ReasoningGymConfig
from prl_reasoning_gym.environment import ReasoningGym, build
from prl_reasoning_gym.families import questions as made_questions
from prl_reasoning_gym.splits import interleave, select, shares, split_of

WORDS = {"min_word_len": 3, "max_word_len": 6}


def environment(**settings: Any) -> ReasoningGym:
    return build(ReasoningGymConfig(name="gym", **settings), seed=settings.pop("seed", 0))


def questions(env: ReasoningGym, split: Split) -> list[str]:
    return [env.task(split, index).messages[-1]["content"] for index in range(env.size(split))]


class Said:
    """A finished conversation, as far as scoring looks at it."""

    def __init__(self, reply: str) -> None:
        self.reply = reply


def rewards(env: ReasoningGym, task: Task, *replies: str) -> list[tuple[float, float]]:
    conversations: Any = [Said(reply) for reply in replies]
    return [(s.reward, s.metrics["accuracy"]) for s in asyncio.run(env.score(task, conversations))]


@pytest.mark.parametrize(
    ("dataset", "parameters"),
    [("spell_backward", WORDS), ("basic_arithmetic", {}), ("coin_flip", {}), ("letter_counting", {}), ("acre", {})],
)
def test_splits_are_disjoint_and_distinct(dataset: str, parameters: dict[str, Any]) -> None:
    env = environment(dataset=dataset, parameters=parameters, size=300, eval_size=30)
    train, held_out = questions(env, "train"), questions(env, "eval")
    assert not set(train) & set(held_out)
    assert len(set(train)) == len(train) == env.size("train") > 100
    assert len(set(held_out)) == len(held_out) == env.size("eval") > 10


def test_a_word_is_held_out_for_every_seed_and_difficulty() -> None:
    short = build(ReasoningGymConfig(dataset="spell_backward", parameters=WORDS, size=3000, eval_size=300), seed=0)
    long = build(ReasoningGymConfig(dataset="spell_backward", size=3000, eval_size=300), seed=5)
    assert not set(questions(short, "train")) & set(questions(long, "eval"))
    assert not set(questions(long, "train")) & set(questions(short, "eval"))
    words = {q.rpartition(" ")[2].lower() for q in questions(short, "train")}
    held_out = {q.rpartition(" ")[2].lower() for q in questions(short, "eval")}
    assert not words & held_out
    assert {len(word) for word in held_out} == {3, 4, 5, 6}


def test_sizes_are_what_was_asked_for_or_all_there_is() -> None:
    plenty = environment(dataset="spell_backward", parameters=WORDS, size=2500, eval_size=150)
    assert (plenty.size("train"), plenty.size("eval")) == (2500, 150)
    scarce = environment(dataset="coin_flip", parameters={"min_trials": 3, "max_trials": 5}, size=1000, eval_size=100)
    assert 10 <= scarce.size("train") + scarce.size("eval") < 60


def test_tasks_are_the_same_in_every_process() -> None:
    program = (
        "import hashlib, json; from prl_reasoning_gym import ReasoningGymConfig;"
        "from prl_reasoning_gym.environment import build;"
        "env = build(ReasoningGymConfig(dataset='spell_backward', size=200, eval_size=20), seed=3);"
        "print(hashlib.sha256(json.dumps([env.task(s, i).messages for s in ('train', 'eval')"
        " for i in range(env.size(s))]).encode()).hexdigest())"
    )
    there = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, check=True
    )
    env = build(ReasoningGymConfig(dataset="spell_backward", size=200, eval_size=20), seed=3)
    splits: tuple[Split, ...] = ("train", "eval")
    here = [env.task(split, index).messages for split in splits for index in range(env.size(split))]
    assert there.stdout.decode().strip() == hashlib.sha256(json.dumps(here).encode()).hexdigest()


def test_the_dataset_scores_the_reply() -> None:
    env = environment(dataset="spell_backward", parameters=WORDS)
    task = env.task("train", 0)
    answer = task.data["entry"]["answer"]
    half = answer[:1] + "?" * (len(answer) - 1)
    assert rewards(env, task, answer, f" {answer}\n", "?", "") == [(1.0, 1.0), (1.0, 1.0), (0.0, 0.0), (0.0, 0.0)]
    ((partial, accurate),) = rewards(env, task, half)
    assert partial == pytest.approx(1 / len(answer))
    assert accurate == 0.0


def test_more_than_the_answer_is_not_accurate() -> None:
    """The scorer gives almost full marks to an answer with something behind it."""
    env = environment(dataset="spell_backward", parameters={"min_word_len": 6, "max_word_len": 6})
    task = env.task("train", 0)
    ((_, accurate),) = rewards(env, task, task.data["entry"]["answer"] + "tail")
    assert accurate == 0.0


@pytest.mark.parametrize("outcome", [ValueError("junk"), SystemExit(), float("nan"), float("inf")])
def test_what_a_scorer_cannot_handle_is_a_wrong_answer(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> None:
    env = environment(dataset="spell_backward", parameters=WORDS, size=10, eval_size=1)

    def score_answer(self: Any, answer: str, entry: Any) -> float:
        if isinstance(outcome, BaseException):
            raise outcome
        return float(outcome)

    monkeypatch.setattr(type(env._datasets[0]), "score_answer", score_answer)
    assert rewards(env, env.task("train", 0), "junk") == [(0.0, 0.0)]


def test_prime_factorization_raises_on_junk_and_gives_nothing() -> None:
    env = environment(dataset="prime_factorization", size=20, eval_size=2)
    assert rewards(env, env.task("train", 0), "junk", "1/0") == [(0.0, 0.0), (0.0, 0.0)]


def test_demonstrations_solve_the_task_where_there_is_an_answer() -> None:
    env = environment(dataset="spell_backward", parameters=WORDS, instruction="answer with the word only")
    task = env.task("eval", 2)
    messages = env.demonstration(task)
    assert messages is not None
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert messages[0]["content"] == "answer with the word only"
    assert messages[2]["content"] == messages[1]["content"].rpartition(" ")[2][::-1]
    unanswered = environment(dataset="graph_color", size=20, eval_size=2)
    assert unanswered.demonstration(unanswered.task("train", 0)) is None


def test_a_mix_follows_its_weights_in_every_stretch() -> None:
    mix = (Family(dataset="spell_backward", weight=3.0, parameters=WORDS), Family(dataset="basic_arithmetic"))
    env = environment(mix=mix, size=400, eval_size=40)
    assert (env.size("train"), env.size("eval")) == (400, 40)
    families = [env.task("train", index).data["family"] for index in range(400)]
    assert families.count(0) == 300
    assert {families[start : start + 40].count(0) for start in range(0, 400, 40)} <= {29, 30, 31}
    held_out = [env.task("eval", index).data["family"] for index in range(40)]
    assert held_out.count(0) == 30


def test_a_task_of_a_mix_is_scored_by_its_own_dataset() -> None:
    env = environment(mix=(Family(dataset="spell_backward"), Family(dataset="basic_arithmetic")), size=40, eval_size=4)
    for index in range(8):
        task = env.task("train", index)
        assert rewards(env, task, str(task.data["entry"]["answer"])) == [(1.0, 1.0)]


def test_select_reads_no_further_than_it_must() -> None:
    def endless() -> Any:
        number = 0
        while True:
            yield f"question {number // 2}"
            number += 1

    seen: set[int] = set()
    found = select(endless(), {"train": 5, "eval": 2}, seen)
    assert [len(found["train"]), len(found["eval"])] == [5, 2]
    assert all(split_of(f"question {n // 2}") == split for split, numbers in found.items() for n in numbers)
    assert all(number % 2 == 0 for numbers in found.values() for number in numbers)
    assert len(seen) == 7


def test_shares_sum_to_the_total() -> None:
    assert shares(10, [1.0, 1.0, 1.0]) == [3, 4, 3]
    assert shares(100, [3.0, 1.0]) == [75, 25]


def test_interleave_keeps_proportions_and_order() -> None:
    assert interleave([[10, 11, 12, 13], [20, 21]]) == [(0, 10), (1, 20), (0, 11), (0, 12), (1, 21), (0, 13)]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dataset": "spel_backward"}, "no dataset 'spel_backward' (did you mean 'spell_backward'?)"),
        (
            {"dataset": "spell_backward", "parameters": {"min_wrd_len": 3}},
            "spell_backward has no parameter 'min_wrd_len' (did you mean 'min_word_len'?); it has, with their "
            "defaults: min_word_len = 3, max_word_len = 10",
        ),
        (
            {"dataset": "spell_backward", "parameters": {"min_word_len": 0}},
            "refuses its parameters (min_word_len = 0): min_word_len must be positive",
        ),
        ({"dataset": "spell_backward", "parameters": {"seed": 1}}, "'seed' is no parameter of spell_backward"),
        (
            {"dataset": "spell_backward", "parameters": {"min_word_len": 90, "max_word_len": 90}},
            "environment 'gym' finds no train tasks",
        ),
        (
            {"dataset": "basic_arithmetic", "parameters": {"operators": ["+", "no"]}},
            "refuses its parameters (operators = ['+', 'no']): unsupported operator: no",
        ),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        environment(**settings)
    assert sentence in str(caught.value)


def test_an_item_that_cannot_be_made_is_named() -> None:
    class Broken(list[Any]):
        def __getitem__(self, number: Any) -> Any:
            raise ValueError("sample larger than population")

    with pytest.raises(UserError, match="acre cannot make item 0 with its parameters: sample larger"):
        list(made_questions(Broken([1, 2]), "acre"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "got neither"),
        ({"dataset": "acre", "mix": (Family(dataset="acre"),)}, "got both"),
        ({"mix": (Family(dataset="acre"),), "parameters": {"a": 1}}, "parameters belong to the entries of mix"),
    ],
)
def test_sections_that_contradict_themselves(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ReasoningGymConfig(**settings)


def test_the_plugin_imports_nothing_heavy() -> None:
    program = "import sys, prl_reasoning_gym; print('reasoning_gym' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.decode().split() == ["False", "False"]
