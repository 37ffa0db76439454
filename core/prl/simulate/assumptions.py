"""What a simulation assumes about a run that has not happened: one flag of `prl simulate` per field.

Knows how the config completes them: the engines' number, the cut of lengths. Fitted values (`prl.simulate.fit`) are
assumptions too; a flag that is given wins over them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from attrs import validators

from prl.compose.config import Run, not_negative, positive
from prl.providers import option
from prl.simulate.cluster import Cluster
from prl.simulate.workload import EmpiricalLengths, Lengths, LognormalLengths, LognormalSeconds, Workload

if TYPE_CHECKING:
    from prl.compose.compose import Composition

_SLOTS = 64
_share = validators.and_(validators.ge(0.0), validators.le(1.0))


@attrs.frozen(kw_only=True)
class Assumptions:
    """Lengths in tokens, times in seconds."""

    length_mean: float = option(
        0.0, help="sampled tokens of a rollout, on average; 0: half of rollouts.max_tokens", validator=not_negative
    )
    length_sigma: float = option(0.6, help="their spread: standard deviation of the logarithm", validator=not_negative)
    length_correlation: float = option(0.5, help="share of that variance that belongs to the task", validator=_share)
    latency_mean: float = option(
        0.0, help="seconds in the environment per rollout (tools, scoring), on average", validator=not_negative
    )
    latency_sigma: float = option(1.0, help="their spread: standard deviation of the logarithm", validator=not_negative)
    failure: float = option(0.0, help="probability that a rollout fails", validator=_share)
    slots: int = option(
        0,
        help=f"sequences that decode at once on an engine; 0: engine.sequences, or {_SLOTS} for an engine without it",
        validator=not_negative,
    )
    decode_base: float = option(0.02, help="seconds of a decoding step, however few sequences", validator=positive)
    decode_per_sequence: float = option(0.0002, help="added to it by each running sequence", validator=not_negative)
    step_base: float = option(1.0, help="seconds of an optimizer step, however few tokens", validator=not_negative)
    step_per_token: float = option(0.0001, help="added to it by each sampled token", validator=not_negative)
    publish: float = option(
        1.0, help="seconds from the end of a step until every engine serves its weights", validator=not_negative
    )
    recorded: tuple[tuple[int, ...], ...] = ()
    """Lengths by group of a past run; with a length_mean of 0 they take the place of the lognormal."""

    def completed(self, composition: Composition) -> Assumptions:
        """With what the config says where a value was left to it."""
        sequences = composition.resolved["engine"].get("sequences", _SLOTS)
        mean = 0.0 if self.recorded else composition.run.rollouts.max_tokens / 2
        return attrs.evolve(self, slots=self.slots or sequences, length_mean=self.length_mean or mean)

    def workload(self, run: Run) -> Workload:
        """`self` is complete."""
        return Workload(
            lengths=self._lengths(run),
            latency=LognormalSeconds(mean=self.latency_mean, sigma=self.latency_sigma),
            failure=self.failure,
        )

    def _lengths(self, run: Run) -> Lengths:
        if not self.length_mean:
            return EmpiricalLengths(groups=self.recorded)
        return LognormalLengths(
            mean=self.length_mean,
            sigma=self.length_sigma,
            correlation=self.length_correlation,
            most=run.rollouts.max_tokens,
        )

    def cluster(self, run: Run) -> Cluster:
        """`self` is complete."""
        return Cluster(
            engines=run.engine.count,
            slots=self.slots,
            decode_base=self.decode_base,
            decode_per_sequence=self.decode_per_sequence,
            step_base=self.step_base,
            step_per_token=self.step_per_token,
            publish=self.publish,
        )


FLAGS = tuple(field for field in attrs.fields(Assumptions) if field.name != "recorded")
"""The fields a person can set."""
