"""Seconds of a training step: FLOPs by kind of work, bytes, and what others hold up.

What is not modelled is named where it is shown: kernels reach their measured rates at every shape, exchanges do not
slow kernels down, and only parameters, and activations in host memory, are fetched while something computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import attrs

from prl.plan.devices import Device, Rates
from prl.plan.exchange import exchanges, replicate
from prl.plan.memory import Memory, Settings, activations_away
from prl.plan.workload import part

if TYPE_CHECKING:
    from prl.train.flops import Flops
    from prl.train.survey import Survey

MicroBatches = Sequence[Sequence[Sequence[int]]]
"""Data rank -> micro-batch -> lengths of its documents."""


@attrs.frozen(kw_only=True)
class StepTime:
    """Of one optimizer step."""

    parts: Mapping[str, float]
    """What the slowest rank's seconds go to; they add up to the step."""
    exchanged: Mapping[str, float]
    """Axis -> bytes a rank receives; `host`: activations that go to host memory and come back."""
    flops: Mapping[str, float]
    """Kind of work -> operations of the whole step over all ranks, with what is computed again."""
    model_flops: float
    tokens: int
    devices: int
    peak: float
    """Operations per second of a device."""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def bottleneck(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def tokens_per_second_per_device(self) -> float:
        return self.tokens / self.seconds / self.devices

    @property
    def mfu(self) -> float:
        return self.model_flops / self.seconds / self.devices / self.peak


def step_time(
    survey: Survey, settings: Settings, memory: Memory, micro_batches: MicroBatches, *, device: Device, sampled: float
) -> StepTime:
    """Ranks meet in every micro-batch, so each lasts as long as the heaviest of its kind."""
    rates = device.rates
    assert rates is not None, "planned devices have rates"
    cost = _Costs(survey, settings, rates, sampled, micro_batches)
    parts: dict[str, float] = {}
    exchanged: dict[str, float] = {}
    for index in range(len(micro_batches[0])):
        together = [rank[index] for rank in micro_batches]
        seconds = [cost.seconds(lengths) for lengths in together]
        slowest = max(range(len(together)), key=lambda r: sum(seconds[r].values()))
        computing = sum(seconds[slowest].values())
        _add(parts, seconds[slowest])
        for axis, exchange in exchanges(survey, settings, sum(together[slowest]), rates).items():
            _add(exchanged, {axis: exchange.bytes})
            hidden = computing if axis == "shard" else 0.0
            _add(parts, {f"exchange: {axis}": max(0.0, exchange.seconds - hidden)})
        away = 2 * activations_away(survey, settings, -(-sum(together[slowest]) // settings.layout.context))
        _add(exchanged, {"host": away})
        _add(parts, {"exchange: host": max(0.0, away / rates.host - computing)})
    copies = replicate(memory.gradients, settings.layout, rates)
    _add(exchanged, {"replicate": copies.bytes})
    _add(parts, {"exchange: replicate": copies.seconds, "optimizer": _optimizer(memory, rates)})
    whole = [cost.flops(lengths) for rank in micro_batches for lengths in rank]
    flops: dict[str, float] = {}
    for each in whole:
        for side in (each.forward, each.backward, each.recompute):
            _add(flops, side)
    return StepTime(
        parts=parts,
        exchanged={axis: n for axis, n in exchanged.items() if n},
        flops=flops,
        model_flops=sum(each.model for each in whole),
        tokens=sum(sum(lengths) for rank in micro_batches for lengths in rank),
        devices=settings.layout.ranks,
        peak=device.peak,
    )


def _add(total: dict[str, float], more: Mapping[Any, float]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value


def _optimizer(memory: Memory, rates: Rates) -> float:
    """Everything is read and written once; what is in host memory crosses the bus both ways."""
    on_device = 2 * (memory.parameters + memory.optimizer) + memory.gradients
    return on_device / rates.memory + 2 * memory.host / rates.host


class _Costs:
    """Of micro-batches under one layout."""

    def __init__(
        self, survey: Survey, settings: Settings, rates: Rates, sampled: float, micro_batches: MicroBatches
    ) -> None:
        self._survey, self._settings, self._rates, self._sampled = survey, settings, rates, sampled
        heaviest = max((m for rank in micro_batches for m in rank), key=sum)
        lengths = part(heaviest, settings.layout.context)
        _, footprints, _ = survey.footprints(lengths, expert=settings.layout.expert, recompute=settings.recompute)
        moved = sum(len(kind.layers) * f.traffic for kind, f in zip(survey.kinds, footprints, strict=True))
        again = 4 / 3 if settings.checkpointing == "full" else 1.0
        self._moved_per_token = again * moved / max(1, sum(lengths))
        self.flops = lru_cache(maxsize=None)(self._flops)

    def _flops(self, lengths: tuple[int, ...]) -> Flops:
        """Over all ranks that share the micro-batch."""
        survey = self._survey
        total = survey.head_flops(round(sum(lengths) * self._sampled))
        again = survey.recomputed_flops(lengths, self._settings.recompute)
        for kind, flops, once_more in zip(survey.kinds, survey.layer_flops(lengths), again, strict=True):
            flops = flops.checkpointed() if self._settings.checkpointing == "full" else flops + once_more
            total = total + flops.scaled(len(kind.layers))
        return total

    def seconds(self, lengths: Sequence[int]) -> dict[str, float]:
        """Of one rank, by kind of work."""
        flops, context = self.flops(tuple(lengths)), self._settings.layout.context
        seconds: dict[str, float] = {}
        for side, backward in ((flops.forward, False), (flops.backward, True), (flops.recompute, False)):
            _add(seconds, {work: n / context / self._rate(work, backward) for work, n in side.items()})
        seconds["elementwise"] = self._moved_per_token * sum(lengths) / context / self._rates.memory
        return seconds

    def _rate(self, work: str, backward: bool) -> float:
        rate: float = getattr(self._rates, "attention_backward" if backward and work == "attention" else work)
        return rate
