"""A study as rows of text and as JSON."""

from __future__ import annotations

from typing import Any, TypeAlias

import attrs

from prl.plan import layout as layouts
from prl.plan.advise import Advice
from prl.plan.memory import Memory
from prl.plan.serving import FLOOR, Serving
from prl.plan.study import RESERVED, Options, Outcome, Study, waits
from prl.plan.timing import StepTime
from prl.train.layout import Layout

Rows: TypeAlias = list[list[str]]
_SHOWN = 12
"""Layouts of each sort that are shown."""


def sections(study: Study, advice: Advice) -> list[tuple[str, Rows]]:
    """(title, rows) in the order in which they are read."""
    shown, engines = advice.shown, study.serving()
    assert shown.memory is not None
    assert shown.time is not None
    parts = [
        ("planned", _planned(study)),
        (f"layout: {_verdict(advice)}", _layout_rows(shown.layout)),
        ("bytes of a rank", _memory_rows(shown.memory, shown.options, study.budget)),
        (f"a training step: {shown.time.seconds:,.1f} s, most of it {shown.time.bottleneck}", _time_rows(shown.time)),
        ("engines", _engine_rows(study, engines)),
        ("a step, all at the same time", _wait_rows(shown, engines)),
        ("layouts that work", _works(advice)),
        ("layouts that cannot work", _fails(advice)),
        ("assumed", _assumed(study)),
    ]
    return [(title, rows) for title, rows in parts if rows]


def _planned(study: Study) -> Rows:
    run, lengths = study.composition.run, study.lengths
    fleet = study.options.fleet
    return [
        ["model", f"{study.composition.provider(run.model).name}, {study.parameters / 1e9:,.2f}B parameters"],
        ["layers", ", ".join(f"{len(kind.layers)} x {kind.name}" for kind in study.survey.kinds)],
        ["devices", f"{study.ranks} train, {fleet.all_devices} sample: {study.options.device.name}"],
        [
            "rollouts",
            f"{len(lengths)} a step, {sum(lengths) / 1e6:,.2f}M tokens: mean {sum(lengths) / len(lengths):,.0f}, "
            f"longest {max(lengths):,}; {study.options.rollouts.sampled:.0%} sampled",
        ],
    ]


def _verdict(advice: Advice) -> str:
    if advice.remedy:
        return f"none works as configured. What would: {advice.remedy}"
    if advice.configured.works:
        return "as configured"
    reasons = "; ".join(advice.configured.reasons)
    return (
        f"the configured one ({layouts.shown(advice.configured.layout)}) cannot work ({reasons}); the fastest that does"
    )


def _layout_rows(layout: Layout) -> Rows:
    return [[axis, str(getattr(layout, axis))] for axis in layouts.AXES]


def _memory_rows(memory: Memory, options: Options, budget: float) -> Rows:
    held = [
        ("parameters", memory.parameters, "its shard"),
        ("gradients", memory.gradients, "its shard"),
        ("optimizer", memory.optimizer, f"{_gb(memory.host)} more in host memory" if memory.host else "its shard"),
        ("gathered", memory.gathered, "whole layers, embedding and head, and their gradients, while they are needed"),
        ("kept", memory.kept, f"activations; checkpointing: {_checkpointing(options)}{_away(memory)}"),
        ("working", memory.working, "of the largest layer"),
    ]
    rows = [[name, _gb(size), note] for name, size, note in held]
    return rows + [
        [f"most in {phase}", _gb(size), f"{size / budget:.0%} of {_gb(budget)}"]
        for phase, size in memory.phases.items()
    ]


def _checkpointing(options: Options) -> str:
    return f"{options.checkpointing} ({', '.join(options.recompute)})" if options.recompute else options.checkpointing


def _away(memory: Memory) -> str:
    return f", {_gb(memory.host_activations)} more in host memory" if memory.host_activations else ""


def _time_rows(time: StepTime) -> Rows:
    rows = [["", "seconds", "share", "TFLOP", "GB received by a rank"]]
    for name, seconds in sorted(time.parts.items(), key=lambda item: -item[1]):
        axis = name.removeprefix("exchange: ")
        flops, received = time.flops.get(name), time.exchanged.get(axis)
        if seconds or received:
            cells = [f"{seconds:,.2f}", f"{seconds / time.seconds:.0%}"]
            rows.append([name, *cells, f"{flops / 1e12:,.1f}" if flops else "", _number(received)])
    return [
        *rows,
        [
            "tokens per second",
            f"{time.tokens / time.seconds:,.0f}",
            f"{time.tokens_per_second_per_device:,.0f} per device",
            "",
            "",
        ],
        ["MFU", f"{time.mfu:.1%}", f"of {time.peak / 1e12:,.0f} TFLOP/s", "", ""],
    ]


def _number(received: float | None) -> str:
    return "" if received is None else f"{received / 1e9:,.1f}"


def _engine_rows(study: Study, engines: Serving) -> Rows:
    fleet = study.options.fleet
    fits = f"{engines.longest_sequences:,} sequences of {max(study.lengths):,} tokens"
    return [
        ["engines", f"{fleet.engines} of {fleet.devices} devices"],
        ["weights", f"{_gb(engines.weights)} of {_gb(study.options.device.memory)} on a device"],
        ["a token leaves", f"{engines.bytes_per_token:,} bytes, and a sequence {engines.bytes_per_sequence:,}"],
        [
            "room for",
            fits if engines.longest_sequences else "none: the weights fill the device; more devices an engine",
        ],
        ["decoding", f"{engines.decoding:,} sequences at once, {1e3 * engines.decode_seconds:,.1f} ms a token of each"],
        ["longest rollout", f"{engines.longest_rollout:,.0f} s of sampling alone"],
        ["weight update", f"{_gb(engines.update_bytes)} a copy, {engines.update_seconds:,.1f} s at least"],
    ]


def _wait_rows(shown: Outcome, engines: Serving) -> Rows:
    seconds = waits(shown, engines)
    slowest = max(seconds, key=lambda name: seconds[name])
    return [[name, f"{each:,.1f} s", "<- the bottleneck" if name == slowest else ""] for name, each in seconds.items()]


def _works(advice: Advice) -> Rows:
    outcomes = [outcome for outcome in (advice.configured, *advice.others) if outcome.works]
    if not outcomes:
        return []
    rows = [["LAYOUT", "GB", "SECONDS", "TOKENS/S/DEVICE", "MFU", "MOST OF IT"]]
    for outcome in outcomes[:_SHOWN]:
        assert outcome.memory is not None
        assert outcome.time is not None
        time = outcome.time
        rows.append(
            [
                layouts.shown(outcome.layout),
                f"{outcome.memory.peak / 1e9:,.0f}",
                f"{time.seconds:,.1f}",
                f"{time.tokens_per_second_per_device:,.0f}",
                f"{time.mfu:.1%}",
                f"{time.bottleneck} ({time.parts[time.bottleneck] / time.seconds:.0%})",
            ]
        )
    return rows


def _fails(advice: Advice) -> Rows:
    outcomes = [outcome for outcome in (advice.configured, *advice.others) if not outcome.works]
    rows = [[layouts.shown(outcome.layout), "; ".join(outcome.reasons)] for outcome in outcomes[:_SHOWN]]
    more = len(outcomes) - _SHOWN
    return rows + ([[f"and {more} more", ""]] if more > 0 else [])


def _assumed(study: Study) -> Rows:
    selecting = [kind.selects for kind in study.survey.kinds if 0 < kind.selects < max(study.lengths)]
    rows = [[source, text] for source, text in study.options.device.sources.items()]
    rows.append(["reserved", f"{RESERVED:.0%} of a device for driver, collectives and fragmentation"])
    rows.append(["decoding", f"at least {FLOOR} s a token; experts chosen at random; attention copied to every device"])
    rows.append(["overlap", "parameters arrive while layers compute; tokens for experts and keys of others do not"])
    rows.append(["balance", "experts get equally many tokens; documents are shared equally within context"])
    if study.formats.compute < study.formats.parameter:
        rows.append(["products", f"in {study.options.compute}, beside parameters of {study.formats.parameter} bytes"])
    if selecting:
        rows.append(
            [
                "selection",
                f"of {selecting[0]:,} tokens by a fused kernel; the reference's masks would not fit in memory",
            ]
        )
    return rows


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


# --- JSON -------------------------------------------------------------------------------------------------------------
def as_json(study: Study, advice: Advice) -> dict[str, Any]:
    """JSON-ready; bytes and seconds."""
    engines = study.serving()
    return {
        "parameters": study.parameters,
        "devices": {"trainer": study.ranks, "engines": study.options.fleet.all_devices},
        "device": study.options.device.key,
        "budget": study.budget,
        "tokens": sum(study.lengths),
        "remedy": advice.remedy,
        "configured": _outcome_json(advice.configured),
        "shown": _outcome_json(advice.shown),
        "others": [_outcome_json(outcome) for outcome in advice.others],
        "engines": attrs.asdict(engines),
        "waits": dict(waits(advice.shown, engines)),
    }


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    document: dict[str, Any] = {"layout": attrs.asdict(outcome.layout), "reasons": list(outcome.reasons)}
    if outcome.memory and outcome.time:
        time = outcome.time
        document["memory"] = {**attrs.asdict(outcome.memory), "peak": outcome.memory.peak}
        document["time"] = {
            **attrs.asdict(time),
            "seconds": time.seconds,
            "bottleneck": time.bottleneck,
            "tokens_per_second_per_device": time.tokens_per_second_per_device,
            "mfu": time.mfu,
        }
    return document
