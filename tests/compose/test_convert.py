"""The strict converter: nothing coerced, everything reported, paths and values named."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
from attrs import validators
from prl import option
from prl.compose.config import LossConfig, Run
from prl.compose.convert import StructureError, _Structurer, unstructure
from prl.compose.registry import Registry


class Color(Enum):
    RED = "red"


@attrs.frozen(kw_only=True)
class Inner:
    ratio: float = option(1.0, help="", validator=validators.gt(0))
    names: tuple[str, ...] = option((), help="", validator=validators.max_len(2))


@attrs.frozen(kw_only=True)
class Outer:
    steps: int = option(help="how many", validator=validators.ge(0))
    on: bool = False
    text: str = ""
    mode: Literal["auto", "cpu"] = "auto"
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    table: Mapping[str, float] = attrs.field(factory=dict)
    free: Mapping[str, Any] = attrs.field(factory=dict)
    maybe: int | None = None
    either: int | str = 0
    path: Path = Path()
    color: Color = Color.RED
    low: float = 0.0
    high: float = attrs.field(default=1.0)

    @high.validator
    def _above_low(self, _: attrs.Attribute[float], value: float) -> None:
        if value <= self.low:
            raise ValueError(f"must be > low ({self.low}), got {value}")


def structure(raw: Any, cls: type = Outer) -> Any:
    return _Structurer(Registry(), lambda kind, name: f"unknown {kind} {name!r}").converter.structure(raw, cls)


def problems(raw: Any, cls: type = Outer) -> dict[str, str]:
    with pytest.raises(StructureError) as caught:
        structure(raw, cls)
    return {p.path: p.message for p in caught.value.problems}


def test_values_of_the_right_type_are_kept() -> None:
    raw = {
        "steps": 3,
        "on": True,
        "mode": "cpu",
        "inner": {"ratio": 2, "names": ["a"]},
        "inners": [{"ratio": 0.5}],
        "table": {"x": 1},
        "free": {"y": [1, "z"]},
        "maybe": 4,
        "either": "e",
        "path": "a/b",
        "color": "red",
    }
    outer = structure(raw)
    assert outer == Outer(
        steps=3,
        on=True,
        mode="cpu",
        inner=Inner(ratio=2.0, names=("a",)),
        inners=(Inner(ratio=0.5),),
        table={"x": 1.0},
        free={"y": [1, "z"]},
        maybe=4,
        either="e",
        path=Path("a/b"),
    )
    assert type(outer.inner.ratio) is float
    assert structure(unstructure(outer, Registry())) == outer


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", "100", "expected int, got str '100'"),
        ("steps", 3.7, "expected int, got float 3.7"),
        ("steps", True, "expected int, got bool True"),
        ("on", "false", "expected bool, got str 'false'"),
        ("on", 1, "expected bool, got int 1"),
        ("text", 5, "expected str, got int 5"),
        ("low", "1.0", "expected float, got str '1.0'"),
        ("mode", "cpuu", "expected one of 'auto', 'cpu', got str 'cpuu' (did you mean 'cpu'?)"),
        ("inner", 3, "expected a table, got int 3"),
        ("inners", {"a": 1}, "expected an array, got a table with a"),
        ("inners", "abc", "expected an array, got str 'abc'"),
        ("maybe", "x", "expected int, got str 'x'"),
        ("path", 3, "expected a path, got int 3"),
        ("color", "blue", "'blue' is not a valid Color"),
        ("table", [1], "expected a table, got array [1]"),
        ("stepz", 1, "unknown key 'stepz' (did you mean 'steps'?)"),
        ("steps", -1, "must be >= 0, got -1"),
        ("high", -1.0, "must be > low (0.0), got -1.0"),
    ],
)
def test_a_wrong_value_is_described(key: str, value: object, message: str) -> None:
    assert problems({"steps": 1, key: value}) == {key: message}


def test_every_problem_is_found_in_one_pass() -> None:
    raw = {
        "on": "yes",
        "inner": {"ratio": -1, "nmes": []},
        "inners": [{}, {"ratio": "x", "names": ["a", 3]}],
        "table": {"k": "v"},
        "colour": "red",
    }
    assert problems(raw) == {
        "steps": "missing key (how many)",
        "on": "expected bool, got str 'yes'",
        "inner.ratio": "must be > 0, got -1.0",
        "inner.nmes": "unknown key 'nmes' (did you mean 'names'?)",
        "inners[1].ratio": "expected float, got str 'x'",
        "inners[1].names[1]": "expected str, got int 3",
        "table.k": "expected float, got str 'v'",
        "colour": "unknown key 'colour' (did you mean 'color'?)",
    }


def test_a_validator_that_is_no_comparison_keeps_its_sentence() -> None:
    assert problems({"names": ["a", "b", "c"]}, Inner) == {"names": "Length of 'names' must be <= 2: 3"}


def test_a_validator_may_read_the_whole_object() -> None:
    @attrs.frozen(kw_only=True)
    class Range:
        low: int = 0
        high: int = attrs.field(default=1)

        @high.validator
        def _wide_enough(self, _: attrs.Attribute[int], value: int) -> None:
            if self.width() < 1:
                raise ValueError(f"high - low must be >= 1, got {self.width()}")

        def width(self) -> int:
            return self.high - self.low

    assert problems({"high": -5}, Range) == {"high": "high - low must be >= 1, got -5"}
    assert structure({"high": 5}, Range).width() == 5


def test_a_section_without_a_type_and_with_an_unknown_one() -> None:
    assert problems({"rl": {"x": 1}, "ce": {"type": "nope"}, "ref_kl": 3}, attrs.make_class("L", _losses())) == {
        "rl.type": "missing: which loss? No plugin of this run provides one",
        "ce.type": "unknown loss 'nope'",
        "ref_kl": "expected a table, got int 3",
    }


def _losses() -> dict[str, Any]:
    return {
        "rl": attrs.field(type=LossConfig),
        "ce": attrs.field(type=LossConfig | None),
        "ref_kl": attrs.field(type=LossConfig),
    }


def test_an_empty_config_says_which_sections_are_missing() -> None:
    found = problems({}, Run)
    assert set(found) == {a.name for a in attrs.fields(Run) if a.default is attrs.NOTHING}
    assert found["scheduler"] == (
        "missing section (what runs next, what is fresh enough). No plugin of this run provides one"
    )
    assert found["environments"].startswith("needs at least one section (what it is trained on)")
    assert found["run"] == "missing section (name, length, seed)"
