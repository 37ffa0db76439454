"""One config under one layout or many: what fits, how long a step takes, and who waits for whom."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from prl.compose.compose import Composition
from prl.errors import UserError
from prl.plan.devices import Device
from prl.plan.layout import impossible
from prl.plan.memory import Checkpointing, Formats, Memory, Settings, memory
from prl.plan.serving import Exported, Fleet, Serving, serving
from prl.plan.timing import StepTime, step_time
from prl.plan.workload import Rollouts, micro_batches
from prl.providers import Model
from prl.train.layout import Layout

if TYPE_CHECKING:
    from prl.train.survey import Survey

RESERVED = 0.06
"""Of a device's memory: the driver, collectives' buffers, fragmentation. Assumed."""


@attrs.frozen(kw_only=True)
class Options:
    """How ranks work, where a config does not say."""

    device: Device
    fleet: Fleet
    rollouts: Rollouts
    compute: str
    """Name of the dtype that products are computed in."""
    checkpointing: Checkpointing
    recompute: tuple[str, ...] = ()
    optimizer_offload: bool
    activation_offload: bool


@attrs.frozen(kw_only=True)
class Outcome:
    """A layout and what comes of it; without `memory` it is impossible, without `time` nobody asked."""

    layout: Layout
    options: Options
    reasons: tuple[str, ...]
    """Why it cannot work; empty: it can."""
    memory: Memory | None = None
    time: StepTime | None = None

    @property
    def works(self) -> bool:
        return not self.reasons


@attrs.frozen(kw_only=True, eq=False)
class Study:
    """A config, surveyed once, to be looked at under any layout."""

    composition: Composition
    options: Options
    survey: Survey
    formats: Formats
    exported: Exported
    lengths: tuple[int, ...]
    """Tokens of every rollout of a step."""

    @property
    def ranks(self) -> int:
        return self.composition.run.trainer.ranks

    @property
    def experts(self) -> int:
        return next((kind.routing.experts for kind in self.survey.kinds if kind.routing), 0)

    @property
    def parameters(self) -> int:
        return sum(p.size for p in self.survey.parameters)

    @property
    def budget(self) -> float:
        """Bytes of a device that a rank may use."""
        return (1 - RESERVED) * self.options.device.memory

    def outcome(self, layout: Layout) -> Outcome:
        """Everything about one layout."""
        reasons = impossible(layout, ranks=self.ranks, experts=self.experts)
        if reasons:
            return Outcome(layout=layout, options=self.options, reasons=tuple(reasons))
        settings = self._settings(layout)
        batches = micro_batches(
            self.lengths,
            data_ranks=layout.data,
            micro_batch_tokens=self._tokens * layout.context,
            costs=self.survey.costs(max(self.lengths), self.composition.run.trainer.costs),
        )
        heaviest = max((lengths for rank in batches for lengths in rank), key=sum)
        needed = memory(self.survey, settings, heaviest, sampled=self.options.rollouts.sampled)
        time = step_time(
            self.survey, settings, needed, batches, device=self.options.device, sampled=self.options.rollouts.sampled
        )
        reasons = self._too_much(needed)
        return Outcome(layout=layout, options=self.options, reasons=tuple(reasons), memory=needed, time=time)

    def serving(self) -> Serving:
        """Of the engines, which no layout of the trainer changes."""
        run = self.composition.run
        ahead = 1 + getattr(run.scheduler, "max_staleness", 1)
        return serving(
            self.survey,
            self.options.fleet,
            self.exported,
            self.lengths,
            sampled=self.options.rollouts.sampled,
            in_flight=ahead * len(self.lengths),
            serve_bytes=self.formats.serve,
            trainer_devices=self.ranks,
            device=self.options.device,
        )

    @property
    def _tokens(self) -> int:
        """Of a rank at one time."""
        return self.composition.run.trainer.micro_batch_tokens

    def _settings(self, layout: Layout) -> Settings:
        return Settings(
            layout=layout,
            formats=self.formats,
            checkpointing=self.options.checkpointing,
            recompute=self.options.recompute,
            optimizer_offload=self.options.optimizer_offload,
            activation_offload=self.options.activation_offload,
            logprob_chunk=self.composition.run.trainer.logprob_chunk,
        )

    def _too_much(self, needed: Memory) -> list[str]:
        phase = max(needed.phases, key=lambda name: needed.phases[name])
        if needed.peak <= self.budget:
            return []
        return [f"{phase} needs {needed.peak / 1e9:.0f} GB of {self.budget / 1e9:.0f} GB"]


def study(composition: Composition, options: Options) -> Study:
    """Survey the config's model; seconds for a trillion parameters."""
    import torch

    from prl.train.survey import exported_bytes, optimizer_bytes, optimizer_working, survey

    run = composition.run
    provider = composition.provider(run.model)
    assert isinstance(provider, Model)
    vocab_size = _vocab_size(composition)
    number_format = composition.build(run.quantization)
    compute: torch.dtype = getattr(torch, options.compute)
    surveyed = survey(
        functools.partial(composition.build, run.model, vocab_size),
        device="cuda",
        dtype=compute,
        float32=provider.float32,
    )
    if not surveyed.vocab_size:
        raise UserError(
            f"{run.tokenizer.file or 'tokenizer'}: not there, and [model] has no vocabulary of its own; "
            "set model.vocab_size or name a tokenizer that exists"
        )
    weight_map = composition.load(provider.weights)(run.model, vocab_size)
    dense, experts = exported_bytes(surveyed, weight_map, number_format, float32=provider.float32)
    build: Callable[[Any], Any] = lambda named: composition.build(run.optimizer, named, 1e-3)  # noqa: E731
    per_byte, per_parameter = optimizer_bytes(build, number_format.train_dtype)
    return Study(
        composition=composition,
        options=options,
        survey=surveyed,
        formats=Formats(
            parameter=number_format.train_dtype.itemsize,
            compute=compute.itemsize,
            optimizer=per_byte,
            optimizer_per_parameter=per_parameter,
            optimizer_working=optimizer_working(build, number_format.train_dtype),
            serve=number_format.serve_dtype.itemsize,
        ),
        exported=Exported(dense=dense, experts=experts),
        lengths=options.rollouts.lengths(run),
    )


def _vocab_size(composition: Composition) -> int:
    """Of the tokenizer where it exists; 0: the model's published one."""
    from prl.rollout.tokenizer import vocab_size_of

    file = composition.run.tokenizer.file
    return 0 if file and not Path(file).exists() else vocab_size_of(composition)


def fastest(outcomes: Sequence[Outcome]) -> Outcome | None:
    """Of those that work."""
    timed = [outcome for outcome in outcomes if outcome.works and outcome.time]
    return min(timed, key=lambda outcome: outcome.time.seconds if outcome.time else 0.0, default=None)


def waits(outcome: Outcome, engines: Serving) -> Mapping[str, float]:
    """Who takes how long for a step when all work at the same time: the longest is the step."""
    assert outcome.time is not None
    return {
        "training": outcome.time.seconds,
        "sampling": engines.seconds,
        "weight update": engines.update_seconds,
    }
