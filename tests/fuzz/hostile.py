"""What a hostile or broken peer may send: nonsense, real messages that were damaged, and headers that promise too much.

`PRL_FUZZ_EXAMPLES` is the number of examples of each test; `benchmarks/fuzz_wires.py` sets it to tens of thousands.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import msgpack
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from prl import wire
from prl.messages import Demonstrations, Failed, GroupDone, Hello, RunGroup, Saved, StepDone
from prl.types import Sampling, TaskRef

from tests.dispatch.fakes import answer, demonstration, manifest

EXAMPLES = int(os.environ.get("PRL_FUZZ_EXAMPLES", "100"))
fuzzed: Callable[..., Any] = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)

REQUEST = RunGroup(
    request=1,
    group_id=3,
    task=TaskRef(environment="toy", split="train", index=5),
    attempt=1,
    size=4,
    sampling=Sampling(temperature=0.5),
    engine="http://127.0.0.1:1",
    version=2,
)
VALID = (
    Hello(role="environment", index=7, pid=2, host="here", sizes={"toy/train": 5}),
    Failed(error="no", request=4),
    GroupDone(request=1, group=answer(REQUEST, failed=1)),
    Demonstrations(request=1, samples=tuple(demonstration(index) for index in range(3))),
    StepDone(step=1, version=1, sums={"loss/rl": 0.1}, values={}, seconds={"wait": 2.0}, manifest=manifest(1)),
    Saved(step=1, rank=0, files={}),
)

# --- values -----------------------------------------------------------------------------------------------------------
numbers = st.integers(-(1 << 63), (1 << 64) - 1) | st.sampled_from([-1, 0, 1, 1 << 31, (1 << 64) - 1]) | st.floats()
plain = st.none() | st.booleans() | numbers | st.text(max_size=20)
"""What both msgpack and JSON can say (NaN and infinities as Python's json writes them)."""
nested = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def _column(index: int, code: int, shape: list[int]) -> msgpack.ExtType:
    return msgpack.ExtType(100, msgpack.packb([index, code, shape]))


columns = st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=40)) | st.builds(
    _column, st.integers(-1, 3), st.integers(-1, 8), st.lists(st.integers(-2, 1 << 62), max_size=4)
)
"""Columns that lie about their type, their frame or their shape."""

# --- frames -----------------------------------------------------------------------------------------------------------
bombs = st.builds(
    lambda head, times, tail: [head * times + tail],
    st.sampled_from([b"\x91", b"\x81\xa0", b"\xdd\xff\xff\xff\xff", b"\xdf\x00\x01\x00\x00\xa0", b"\xdc\xff\xff"]),
    st.integers(1, 3000),
    st.binary(max_size=4),
)
"""Deep nesting, and lists and maps that announce more than they hold."""


@st.composite
def damaged(draw: Any) -> list[bytes]:
    """The frames of a valid message, with one to three of them changed."""
    frames = [bytes(frame) for frame in wire.encode(draw(st.sampled_from(VALID)))]
    for _ in range(draw(st.integers(1, 3))):
        number = draw(st.integers(0, len(frames) - 1))
        frame = frames[number]
        match draw(st.sampled_from(["flip", "cut", "grow", "drop", "repeat"])):
            case "flip" if frame:
                bit = draw(st.integers(0, 8 * len(frame) - 1))
                frames[number] = frame[: bit // 8] + bytes([frame[bit // 8] ^ 1 << bit % 8]) + frame[bit // 8 + 1 :]
            case "cut":
                frames[number] = frame[: draw(st.integers(0, len(frame)))]
            case "grow":
                frames[number] = frame + draw(st.binary(min_size=1, max_size=9))
            case "drop" if len(frames) > 1:
                del frames[number]
            case "repeat":
                frames.insert(number, frame)
    return frames


@st.composite
def restructured(draw: Any) -> list[bytes]:
    """A valid message with one of its fields, at any depth, replaced by something else."""
    frames = wire.encode(draw(st.sampled_from(VALID)))
    header = msgpack.unpackb(frames[0])
    place = header
    key: Any = 1
    while isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
        place = place[key]
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = draw(nested | columns)
    return [msgpack.packb(header), *map(bytes, frames[1:])]


nonsense = st.lists(st.binary(max_size=200), min_size=1, max_size=4)
named = st.builds(
    lambda name, fields, extra: [msgpack.packb([name, fields]), *extra],
    st.sampled_from([type(message).__name__ for message in VALID]) | st.text(max_size=10),
    st.dictionaries(st.text(max_size=10), nested | columns, max_size=5) | nested,
    st.lists(st.binary(max_size=16), max_size=2),
)
messages = nonsense | bombs | damaged() | restructured() | named
