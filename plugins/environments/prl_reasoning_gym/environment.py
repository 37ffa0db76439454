"""The environment: a question, one reply, and the dataset's own opinion of it.

Quirks of the package's scorers, which are used as they are: partial credit is common (a reply to spell_backward earns
the share of letters in place, also when more follows, so that a policy trained on it learns to write on and on:
`partial_credit = false` is the remedy), some raise on text they cannot parse, and those of
string_insertion, spiral_matrix, binary_matrix, n_queens, puzzle24, countdown and three algebra datasets evaluate the
reply as Python: do not train on them where the policy's code must not run.

Four datasets (isomorphic_strings, knight_swap, polynomial_multiplication, ransom_note) draw from sets of strings: the
task of an index is the same in every process only where PYTHONHASHSEED is. Splits are disjoint in any case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from prl.errors import UserError
from prl.providers import Score
from prl.rollout.conversation import Conversation
from prl.types import Message, Split, Task

from prl_reasoning_gym import ReasoningGymConfig
from prl_reasoning_gym.families import create, questions
from prl_reasoning_gym.splits import interleave, items_to_read, select, shares


class ReasoningGym:
    """Tasks are found when it is built, by reading generated items; each is generated again when it is used."""

    def __init__(self, config: ReasoningGymConfig, seed: int) -> None:
        self._config = config
        weights = [family.weight for family in config.families]
        train, held_out = shares(config.size, weights), shares(config.eval_size, weights)
        seen: set[int] = set()
        found = []
        self._datasets: list[Any] = []
        for family, *counts in zip(config.families, train, held_out, strict=True):
            wanted: dict[Split, int] = {"train": counts[0], "eval": counts[1]}
            dataset = create(family, seed=seed, size=items_to_read(wanted))
            found.append(select(questions(dataset, family.dataset), wanted, seen))
            self._datasets.append(dataset)
        splits: tuple[Split, ...] = ("train", "eval")
        self._items = {split: interleave([numbers[split] for numbers in found]) for split in splits}
        for split, items in self._items.items():
            if not items:
                raise UserError(f"environment {config.name!r} finds no {split} tasks; its datasets have too few")

    def size(self, split: Split) -> int:
        """As many as the config asks for; fewer when a dataset has fewer distinct questions than its share."""
        return len(self._items[split])

    def task(self, split: Split, index: int) -> Task:
        family, number = self._items[split][index]
        entry = self._datasets[family][number]
        return Task(index=index, messages=self._opening(entry["question"]), data={"family": family, "entry": entry})

    def _opening(self, question: str) -> tuple[Message, ...]:
        asked = {"role": "user", "content": question}
        return (
            ({"role": "system", "content": self._config.instruction}, asked) if self._config.instruction else (asked,)
        )

    async def rollout(self, task: Task, conversation: Conversation) -> None:
        await conversation.ask(task.messages)

    async def score(self, task: Task, conversations: Sequence[Conversation]) -> list[Score]:
        """Runs where it is called: the process exists for this, and most scorers take microseconds."""
        dataset, entry = self._datasets[task.data["family"]], task.data["entry"]
        return [self._score(_opinion(dataset, entry, talk.reply.strip())) for talk in conversations]

    def _score(self, opinion: float) -> Score:
        solved = float(opinion >= 1.0)
        return Score(reward=opinion if self._config.partial_credit else solved, metrics={"accuracy": solved})

    def demonstration(self, task: Task) -> list[Message] | None:
        """The dataset's own answer, where it has one."""
        answer = task.data["entry"]["answer"]
        return None if answer is None else [*task.messages, {"role": "assistant", "content": str(answer)}]

    async def aclose(self) -> None:
        """Nothing is held open."""


def _opinion(dataset: Any, entry: Any, answer: str) -> float:
    """A reply that the scorer cannot make sense of is a wrong answer of the policy's: reward 0.

    SystemExit is what a scorer that evaluates its input makes of the reply `exit()`.
    """
    try:
        reward = float(dataset.score_answer(answer, entry=entry))
    except (Exception, SystemExit):
        reward = 0.0
    return reward if math.isfinite(reward) else 0.0


def build(config: ReasoningGymConfig, seed: int) -> ReasoningGym:
    return ReasoningGym(config, seed)
