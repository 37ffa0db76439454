"""How fast a run's machines are, in a handful of numbers."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Cluster:
    """Engines, trainer and the way of the weights between them. Times in seconds."""

    engines: int
    slots: int
    """Sequences that decode at once on one engine; more wait there."""
    decode_base: float
    """One decoding step of an engine, however few sequences it holds (reading the weights)."""
    decode_per_sequence: float
    """Added to it by each running sequence."""
    step_base: float
    """One optimizer step, however small the batch."""
    step_per_token: float
    """Added to it by each sampled token of the batch."""
    publish: float
    """From the end of a step to the moment every engine serves its version; engines go on decoding meanwhile."""

    def decode_step(self, running: int) -> float:
        """Seconds in which each of `running` sequences gains a token."""
        return self.decode_base + self.decode_per_sequence * running

    def train_step(self, tokens: int) -> float:
        """Seconds of an optimizer step over `tokens` sampled tokens."""
        return self.step_base + self.step_per_token * tokens
