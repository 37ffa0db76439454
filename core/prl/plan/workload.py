"""The rollouts of a step by their lengths, and the micro-batches they are packed into.

Lengths are drawn as `prl simulate` draws them, lognormal and cut at `rollouts.sequence_length`, so equal settings are
equal steps. They are packed and spread by the functions that pack a run's samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from attrs import validators

from prl.compose.config import Run, not_negative
from prl.providers import option
from prl.score.bins import assign
from prl.score.costs import BY_TOKENS, Costs
from prl.simulate.workload import LognormalLengths, LognormalSeconds, Workload

_share = validators.and_(validators.ge(0.0), validators.le(1.0))


@attrs.frozen(kw_only=True)
class Rollouts:
    """What is assumed of a step's rollouts: one flag of `prl plan` per field."""

    length_mean: float = option(
        0.0,
        help="tokens of a rollout, prompt included, on average before the cut; 0: half of rollouts.sequence_length",
        validator=not_negative,
    )
    length_sigma: float = option(
        0.6, help="their spread: standard deviation of the logarithm; 0: all alike", validator=not_negative
    )
    sampled: float = option(0.5, help="share of a rollout's tokens that the policy samples", validator=_share)

    def lengths(self, run: Run) -> tuple[int, ...]:
        """Tokens of every rollout of one step."""
        longest = run.rollouts.sequence_length
        distribution = LognormalLengths(
            mean=self.length_mean or longest / 2, sigma=self.length_sigma, correlation=0.5, most=longest
        )
        workload = Workload(lengths=distribution, latency=LognormalSeconds(mean=0.0, sigma=0.0))
        groups = range(run.rollouts.groups_per_step)
        size = run.rollouts.group_size
        return tuple(plan.tokens for group in groups for plan in workload.group(run.run.seed, group, 0, size))


def micro_batches(
    lengths: Sequence[int], *, data_ranks: int, micro_batch_tokens: int, costs: Costs = BY_TOKENS
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """For every data rank its micro-batches, each the lengths of its documents; () stands for an empty one."""
    assigned = assign(lengths, costs.of(lengths), data_ranks, capacity=micro_batch_tokens)
    return tuple(tuple(tuple(lengths[i] for i in chosen) for chosen in rank) for rank in assigned)


def part(lengths: Sequence[int], context: int) -> tuple[int, ...]:
    """The documents of the first of `context` ranks that share packed documents in contiguous, equal shards."""
    room = -(-sum(lengths) // context)
    held = []
    for length in lengths:
        held.append(min(length, room))
        room -= held[-1]
        if not room:
            break
    return tuple(held)
