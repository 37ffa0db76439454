"""Which task is issued next, deterministically: a seeded order per environment and epoch, mixed by weight.

The feed knows every issue that has not ended yet, so that its state, taken between two steps, is enough to lose no task
and train none twice: what was outstanding is issued again. It knows nothing of engines, versions or rewards. Called by
the dispatcher (next, retry) and the trainer's loop (finish).
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from prl.dispatch.permutation import Permutation, fraction, mix
from prl.errors import CheckpointError, UserError
from prl.types import TaskRef


@attrs.frozen(kw_only=True)
class Source:
    """An environment as the feed sees it."""

    environment: str
    weight: float
    size: int
    """Tasks of its train split."""


@attrs.frozen(kw_only=True)
class Issue:
    """A task on its way to a trained group. A retry keeps the group id and raises `attempt`."""

    group_id: int
    task: TaskRef
    attempt: int = 0
    position: int = -1
    """Place in the endless order of its environment: epoch * tasks + place in the epoch; -1 outside a feed."""


class Feed:
    """Endless issues in a fixed order; what was cut or failed comes first.

    Example:
        >>> feed = Feed([Source(environment="spell", weight=1.0, size=100)], seed=0, retries=1)
        >>> issue = feed.next()
        >>> feed.retry(issue), feed.next().attempt
        (True, 1)
    """

    def __init__(self, sources: Sequence[Source], *, seed: int, retries: int) -> None:
        self._sources = {source.environment: source for source in sources}
        self._names = sorted(source.environment for source in sources if source.weight > 0)
        self._shares = list(itertools.accumulate(self._sources[name].weight for name in self._names))
        self._seed = seed
        self._retries = retries
        self._issued = 0
        self._positions = dict.fromkeys(self._sources, 0)
        self._again: deque[Issue] = deque()
        self._outstanding: dict[int, Issue] = {}
        _check(sources, self._names)

    def next(self) -> Issue:
        """The next issue; it is outstanding until `finish`."""
        issue = self._again.popleft() if self._again else self._fresh()
        self._outstanding[issue.group_id] = issue
        return issue

    def _fresh(self) -> Issue:
        group_id, self._issued = self._issued, self._issued + 1
        name = self._choose(group_id)
        position = self._positions[name]
        self._positions[name] = position + 1
        epoch, offset = divmod(position, self._sources[name].size)
        order = Permutation(self._sources[name].size, mix(self._seed, *name.encode(), epoch))
        task = TaskRef(environment=name, split="train", index=order(offset))
        return Issue(group_id=group_id, task=task, position=position)

    def _choose(self, number: int) -> str:
        point = fraction(self._seed, number) * self._shares[-1]
        return self._names[min(bisect.bisect_right(self._shares, point), len(self._names) - 1)]

    def retry(self, issue: Issue) -> bool:
        """Issue a task again, before any fresh one; False when it has used up its retries and is given up."""
        if issue.attempt >= self._retries:
            del self._outstanding[issue.group_id]
            return False
        again = attrs.evolve(issue, attempt=issue.attempt + 1)
        self._outstanding[issue.group_id] = again
        self._again.append(again)
        return True

    def finish(self, group_ids: Iterable[int]) -> None:
        """These groups were trained, or given up for good."""
        for group_id in group_ids:
            del self._outstanding[group_id]

    def reclaim(self, group_id: int) -> Issue:
        """The issue of a group that waits to be tried again and need not: it is finished already."""
        issue = self._outstanding[group_id]
        self._again.remove(issue)
        return issue

    def holds(self, group_id: int) -> bool:
        """Whether the group was issued and has not ended."""
        return group_id in self._outstanding

    def outstanding(self, group_id: int) -> Issue:
        """The issue behind a group that has not ended."""
        return self._outstanding[group_id]

    @property
    def alive(self) -> set[tuple[int, int]]:
        """(group id, attempt) of every issue that has not ended."""
        return {(issue.group_id, issue.attempt) for issue in self._outstanding.values()}

    @property
    def waiting(self) -> list[int]:
        """Group ids that wait to be tried again."""
        return [issue.group_id for issue in self._again]

    # --- checkpoints --------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """JSON-ready; outstanding issues are kept in the order of their ids."""
        return {
            "issued": self._issued,
            "positions": dict(self._positions),
            "sizes": {name: source.size for name, source in self._sources.items()},
            "outstanding": [attrs.asdict(self._outstanding[group_id]) for group_id in sorted(self._outstanding)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state` was taken; CheckpointError when the environments are not the same."""
        sizes = {name: source.size for name, source in self._sources.items()}
        if state["sizes"] != sizes:
            raise CheckpointError(
                f"the checkpoint was made with train splits of {state['sizes']} tasks, this run has {sizes}; "
                "resume with the same environments"
            )
        self._issued = state["issued"]
        self._positions = dict(state["positions"])
        issues = [Issue(**{**record, "task": TaskRef(**record["task"])}) for record in state["outstanding"]]
        self._outstanding = {issue.group_id: issue for issue in issues}
        self._again = deque(issues)


def _check(sources: Sequence[Source], drawn: Sequence[str]) -> None:
    empty = [source.environment for source in sources if source.weight > 0 and source.size < 1]
    if empty:
        raise UserError(f"environment {empty[0]!r} has no task in its train split; set its weight to 0 to leave it out")
    if not drawn:
        raise UserError("every environment has weight 0, so there is no task to train on; give one a weight above 0")
