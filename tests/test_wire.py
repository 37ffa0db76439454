"""The wire: what goes in comes out, and what is malformed is refused with a reason."""

from __future__ import annotations

from types import MappingProxyType

import attrs
import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from prl import wire
from prl.messages import TO_CONTROLLER, TO_WORKER, Failed, GroupDone, Hello, RunGroup, StepDone, TrainStep
from prl.score.pack import pack
from prl.types import Batch, Group, MicroBatch, Sampling, TaskRef

from tests.dispatch.fakes import answer, demonstration, manifest


@attrs.frozen(kw_only=True)
class Columns:
    vector: NDArray[np.int32]
    routes: NDArray[np.uint8] | None = None


def through(message, expected=(*TO_CONTROLLER, *TO_WORKER)):
    return wire.decode([bytes(frame) for frame in wire.encode(message)], expected)


def request() -> RunGroup:
    return RunGroup(
        request=7,
        group_id=3,
        task=TaskRef(environment="toy", split="train", index=5),
        attempt=1,
        size=4,
        sampling=Sampling(temperature=0.5, seed=1 << 62),
        engine="http://127.0.0.1:1",
        version=2,
    )


def assert_same(left, right) -> None:
    """Equal all the way down, columns with their dtype and shape."""
    assert type(left) is type(right)
    if isinstance(left, np.ndarray):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert (left == right).all()
    elif attrs.has(type(left)):
        for field in attrs.fields(type(left)):
            assert_same(getattr(left, field.name), getattr(right, field.name))
    elif isinstance(left, tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    else:
        assert left == right


def batch() -> Batch:
    samples = [demonstration(index) for index in range(20)]
    return pack(samples, step=4, version=3, phase="warmup", ranks=2, micro_batch_tokens=10)


@pytest.mark.parametrize(
    "message",
    [
        Hello(role="trainer", index=1, pid=2, host="here", sizes={"toy/train": 5}),
        Failed(error="no", request=4),
        request(),
        GroupDone(request=7, group=answer(request(), failed=1)),
        TrainStep(batch=batch(), learning_rate=0.5, publish=True),
        StepDone(step=1, version=1, sums={"loss/rl": 0.1}, values={}, seconds={"wait": 2.0}, manifest=manifest(1)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_comes_out_as_it_went_in(message):
    assert_same(through(message), message)


@given(
    vector=arrays.arrays(np.int32, st.integers(0, 3000)),
    routes=st.none() | arrays.arrays(np.uint8, st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 2))),
)
def test_columns_of_any_size_and_shape_survive(vector, routes):
    message = Columns(vector=vector, routes=routes)
    assert_same(through(message, [Columns]), message)


def test_long_columns_are_sent_from_where_they_lie():
    column = np.arange(100_000, dtype=np.int32)
    _, frame = wire.encode(Columns(vector=column))
    column[7] = -1
    assert np.frombuffer(frame, dtype=np.int32)[7] == -1


def test_a_view_that_is_not_contiguous_is_copied_in_order():
    column = np.arange(10_000, dtype=np.int32)[::2]
    assert (through(Columns(vector=column), [Columns]).vector == column).all()


def test_any_mapping_may_be_sent():
    message = Hello(role="engine", index=0, pid=1, host="here", sizes=MappingProxyType({"a/eval": 1}))
    assert through(message).sizes == {"a/eval": 1}


def test_an_integer_is_accepted_where_a_float_is_expected():
    assert through(StepDone(step=1, version=1, sums={"x": 3}, values={}, seconds={})).sums == {"x": 3.0}


# --- refusals ---------------------------------------------------------------------------------------------------------
def header(name: str, fields: object) -> list[bytes]:
    return [msgpack.packb([name, fields])]


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([], "IndexError"),
        ([b"\xc1"], "malformed"),
        ([b"not msgpack at all"], "malformed"),
        (header("Stranger", {}), "KeyError('Stranger')"),
        (header("Saved", {}), "required field missing @ $.step"),
        (header("Saved", {"step": "4"}), "expected int, got str '4'"),
        (header("Saved", {"step": True}), "expected int, got bool True"),
        (header("Saved", {"step": 4, "path": "/"}), "path"),
        (header("Failed", {"error": 4}), "@ $.error"),
        (header("Hello", {"role": "king", "index": 0, "pid": 1, "host": ""}), "@ $.role"),
    ],
)
def test_a_malformed_message_is_a_wire_error_with_its_reason(frames, reason):
    with pytest.raises(wire.WireError, match="malformed message") as caught:
        wire.decode(frames, TO_CONTROLLER)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("code", "content", "reason"),
    [
        (3, b"\0" * 5, "buffer size must be a multiple"),
        (17, b"", "column of type 17"),
        (100, msgpack.packb([1, msgpack.ExtType(3, b""), [2]]), "extension 3 inside a column"),
        (100, msgpack.packb([2, 3, [1]]), "column in frame 2 of 2"),
        (100, msgpack.packb([0, 3, [1]]), "column in frame 0 of 2"),
        (100, msgpack.packb([1, 3, [9]]), "column of 8 bytes where shape [9] of int32 has 36"),
        (100, msgpack.packb([1, 3, [-2]]), "column of shape [-2]"),
        (100, msgpack.packb([1, 3, [1 << 62, 1 << 62]]), "column of 8 bytes"),
        (100, b"\xc1", "malformed"),
        (1, b"abcd", "expected a column of int32, got uint8"),
    ],
)
def test_a_column_that_lies_about_itself_is_refused(code, content, reason):
    frames = [msgpack.packb(["Columns", {"vector": msgpack.ExtType(code, content), "routes": None}]), b"8 bytes."]
    with pytest.raises(wire.WireError) as caught:
        wire.decode(frames, [Columns])
    assert reason in str(caught.value)


def test_a_column_where_a_number_belongs_is_refused():
    frames = [msgpack.packb(["Saved", {"step": msgpack.ExtType(3, b"\0" * 4)}])]
    with pytest.raises(wire.WireError, match="expected int, got ndarray"):
        wire.decode(frames, TO_CONTROLLER)


@given(st.lists(st.binary(max_size=60), max_size=3))
def test_no_bytes_do_more_than_be_refused(frames):
    with pytest.raises(wire.WireError):
        wire.decode(frames, TO_CONTROLLER)


def test_a_message_larger_than_the_wire_accepts_is_refused(monkeypatch):
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 10)
    with pytest.raises(wire.WireError, match="message of 11 bytes, more than the 10"):
        wire.decode([b"12345678901"], TO_CONTROLLER)


def test_only_expected_messages_are_accepted():
    with pytest.raises(wire.WireError, match="expected one of Group, MicroBatch: KeyError"):
        through(request(), [Group, MicroBatch])


@pytest.mark.parametrize(
    ("column", "sentence"),
    [(np.zeros(2), "a column of float64 cannot travel"), (np.array([object()]), "a column of object cannot travel")],
)
def test_columns_of_other_types_are_not_sent(column, sentence):
    with pytest.raises(TypeError, match=sentence):
        wire.encode(Columns(vector=column))


def test_objects_that_are_no_messages_are_not_sent():
    with pytest.raises(TypeError, match="a complex cannot travel on a wire"):
        wire.encode(Columns(vector=3j))
