"""The engines: bytes of weights on a device, room for tokens, seconds to sample a step's tokens, and an update.

Attention is copied to every device of an engine and serves its own sequences; experts are divided. A decoding step
reads the weights it touches and what its sequences remember, and takes no less than `FLOOR` seconds. Lower bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from prl.plan.devices import Device

if TYPE_CHECKING:
    from prl.train.survey import Survey

FLOOR = 0.02
"""Launches and exchanges of a decoding step: assumed, as `prl simulate` does."""
_FOR_WEIGHTS_AND_TOKENS = 0.9
"""Of the device's memory; the rest is for activations and graphs."""
_STATE_BYTES = 4


@attrs.frozen(kw_only=True)
class Fleet:
    """The engines of a run."""

    engines: int
    devices: int
    """Of one engine."""

    @property
    def all_devices(self) -> int:
        return self.engines * self.devices


@attrs.frozen(kw_only=True)
class Serving:
    """What the engines have room for, and how fast they sample."""

    weights: int
    """Bytes on a device."""
    bytes_per_token: int
    """Of what a token leaves behind."""
    bytes_per_sequence: int
    """Of a state that does not grow."""
    longest_sequences: int
    """Sequences of the greatest length that fit all engines together; 0: the weights leave no room."""
    decoding: int
    """Sequences at once, over all engines."""
    decode_seconds: float
    """Of one token of each."""
    prefill_seconds: float
    """Of the step's tokens that are not sampled."""
    seconds: float
    """To sample a step's rollouts."""
    longest_rollout: float
    """Seconds of the longest one's tokens, one after the other."""
    update_bytes: int
    """Of one copy of the weights, as they travel."""
    update_seconds: float


@attrs.frozen(kw_only=True)
class Exported:
    """Bytes of the weights as engines get them."""

    dense: int
    experts: int


def serving(
    survey: Survey,
    fleet: Fleet,
    exported: Exported,
    lengths: Sequence[int],
    *,
    sampled: float,
    in_flight: int,
    serve_bytes: int,
    trainer_devices: int,
    device: Device,
) -> Serving:
    """For the rollouts of one step; `in_flight` are as many as the scheduler may keep going."""
    rates = device.rates
    assert rates is not None, "planned devices have rates"
    weights = exported.dense + exported.experts // fleet.devices
    longest = max(lengths)
    per_token = serve_bytes * sum(
        len(k.layers) * (k.remembered.per_token - (k.remembered.shortened if longest <= k.selects else 0))
        for k in survey.kinds
    )
    per_sequence = _STATE_BYTES * sum(len(k.layers) * k.remembered.state for k in survey.kinds)
    room = max(0, int(_FOR_WEIGHTS_AND_TOKENS * device.memory) - weights)
    mean = sum(lengths) / len(lengths)
    fitting = int(room / (per_token * mean + per_sequence)) * fleet.all_devices
    decoding = min(in_flight, fitting)
    touched = _touched(survey, decoding / fleet.engines)
    resident = decoding / fleet.all_devices * (per_token * mean / 2 + per_sequence)
    reading = (exported.dense + touched * exported.experts / fleet.devices + resident) / rates.memory
    active = _active(survey)
    decode = max(FLOOR, reading, 2 * active * decoding / fleet.all_devices / rates.dense)
    tokens = sum(lengths)
    prefill = (1 - sampled) * tokens * 2 * active / rates.dense / fleet.all_devices
    sent = fleet.engines * (exported.dense * fleet.devices + exported.experts) / trainer_devices
    return Serving(
        weights=weights,
        bytes_per_token=per_token,
        bytes_per_sequence=per_sequence,
        longest_sequences=int(room / (per_token * longest + per_sequence)) * fleet.all_devices,
        decoding=decoding,
        decode_seconds=decode,
        prefill_seconds=prefill,
        seconds=prefill + sampled * tokens * decode / decoding if decoding else float("inf"),
        longest_rollout=sampled * longest * decode,
        update_bytes=exported.dense + exported.experts,
        update_seconds=max(sent, weights) / rates.network,
    )


def _active(survey: Survey) -> float:
    """Parameters a token is multiplied with."""
    routing = {index: kind.routing for kind in survey.kinds for index in kind.layers}
    total = float(survey.vocab_size * survey.hidden_size)
    for p in survey.parameters:
        chosen = routing.get(p.layer) if p.layer is not None else None
        if p.layer is not None:
            total += p.size * (chosen.per_token / chosen.experts if p.expert and chosen else 1.0)
    return total


def _touched(survey: Survey, sequences: float) -> float:
    """Share of an engine's experts that a decoding step of so many sequences reads, if they choose at random."""
    routing = next((kind.routing for kind in survey.kinds if kind.routing), None)
    if routing is None:
        return 0.0
    chosen: float = 1.0 - (1.0 - routing.per_token / routing.experts) ** sequences
    return chosen
