"""Router replay outside torch: what is asked of an engine's answer, how turns become columns, what a config may ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from prl.columns import ColumnFolder
from prl.compose.compose import compose
from prl.compose.routing import Routing, replayed
from prl.errors import ConfigError, InfrastructureError
from prl.routes import EXPERTS, VERSIONS, RouteRecord, checked, joined, store, until
from prl.types import Routes

ROUTING = Routing(layers=("layers.1", "layers.3"), experts=8, experts_per_token=2)
SPELL = Path(__file__).parent.parent / "configs" / "spell_backward.toml"


def routes(count: int = 4, *, start: int = 0, version: int = 0, **changes: Any) -> Routes:
    """Row r of layer m is [r + m, r + m + 1] mod 8, plus the version."""
    first = np.arange(start, start + count)[:, None] + np.arange(2) + version
    experts = np.stack((first, first + 1), -1) % 8
    made = Routes(
        layers=ROUTING.layers,
        experts=experts.astype(np.uint8),
        versions=np.full(count, version, np.int32),
        start=start,
    )
    return attrs.evolve(made, **changes)


def test_numbers_of_experts_take_a_byte_up_to_256() -> None:
    widths = {count: attrs.evolve(ROUTING, experts=count).dtype for count in (8, 256, 257, 512)}
    assert widths == {8: "uint8", 256: "uint8", 257: "uint16", 512: "uint16"}


def test_layers_are_taken_by_name_whatever_their_order_and_company() -> None:
    plain = routes()
    rows = {"layers.0": np.zeros((4, 2), np.uint8), "layers.3": plain.experts[:, 1], "layers.1": plain.experts[:, 0]}
    given = attrs.evolve(plain, layers=tuple(rows), experts=np.stack(list(rows.values()), 1))
    taken = checked(given, ROUTING, tokens=5)
    assert taken.layers == ROUTING.layers
    assert taken.experts.tolist() == plain.experts.tolist()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": ("layers.1", "layers.2")}, "layers.3 are missing among the layers layers.1, layers.2"),
        ({"layers": ("layers.1", "layers.1")}, "two layers have one name"),
        ({"layers": ("layers.1",)}, r"shape \(4, 2, 2\), expected \(4, 1, 2\)"),
        ({"experts": np.zeros((4, 2, 3), np.uint8)}, r"shape \(4, 2, 3\)"),
        ({"experts": np.zeros((5, 2, 2), np.uint8)}, r"shape \(5, 2, 2\)"),
        ({"experts": np.zeros(4, np.uint8)}, r"shape \(4,\)"),
        ({"experts": np.zeros((4, 2, 2), np.uint16)}, "uint16 is not uint8, as for 8 experts"),
        ({"experts": np.full((4, 2, 2), 8, np.uint8)}, "name expert 8 of 8"),
        ({"start": 2}, "tokens 2 to 6 where there are 5"),
        ({"start": -1}, "tokens -1 to 3"),
    ],
)
def test_routes_that_make_no_sense_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InfrastructureError, match=sentence):
        checked(routes(**changes), ROUTING, tokens=5)


def test_a_row_that_is_not_known_may_hold_anything() -> None:
    given = routes(experts=np.full((4, 2, 2), 200, np.uint8), versions=np.full(4, -1, np.int32))
    assert checked(given, ROUTING, tokens=5).versions.tolist() == [-1] * 4


def test_a_later_turn_adds_its_tokens_and_leaves_the_old_ones_to_their_version() -> None:
    record = RouteRecord()
    assert (record.known, record.columns(3)) == (0, {})
    record.add(routes(4, version=3))
    assert record.known == 4
    record.add(routes(6, start=2, version=5))  # an engine that does not know `routes_from` says some rows again
    columns = record.columns(9)
    assert columns[VERSIONS].tolist() == [3, 3, 3, 3, 5, 5, 5, 5, -1]
    expected = [*routes(4, version=3).experts.tolist(), *routes(4, start=4, version=5).experts.tolist(), [[0, 0]] * 2]
    assert columns[EXPERTS].tolist() == expected


def test_a_turn_that_says_nothing_leaves_a_hole() -> None:
    record = RouteRecord()
    record.add(routes(2))
    record.add(None)
    record.add(routes(2, start=5))
    assert record.columns(8)[VERSIONS].tolist() == [0, 0, -1, -1, -1, 0, 0, -1]


def test_siblings_share_the_file_of_their_prompt(tmp_path: Path) -> None:
    folder = ColumnFolder(tmp_path)
    stored = []
    for member in range(3):
        columns = RouteRecord([routes(4), routes(3, start=4, version=member)]).columns(8)
        large = store(columns, folder, opening=4, group_id=5, attempt=1)
        for name, column in columns.items():
            assert np.concatenate([folder.read(piece) for piece in large[name]]).tolist() == column.tolist()
        stored.append(large)
    assert len({large[EXPERTS][0].file for large in stored}) == 1
    assert len(folder.files()) == 1 + 3
    assert store({}, folder, opening=4, group_id=5, attempt=1) == {}


def test_a_run_replays_where_there_is_something_to_replay() -> None:
    def routing(*overrides: str, plugins: str = "kimi_k2") -> Routing | None:
        return replayed(compose(SPELL, plugins=plugins, overrides=overrides))

    kimi = routing("model.type=kimi-k2.7")
    assert kimi == Routing(layers=("layers.1", "layers.2", "layers.3"), experts=8, experts_per_token=2)
    assert routing("model.type=kimi-k2.7", "trainer.router_replay=off") is None
    assert routing() is None
    qwen3 = routing("model.experts=4", "trainer.router_replay=on")
    assert qwen3 == Routing(layers=tuple(f"layers.{i}" for i in range(4)), experts=4, experts_per_token=2)


@pytest.mark.parametrize(
    ("plugin", "model", "layers", "dtype", "row"),
    [
        ("glm5", "glm-5.1", range(3, 78), "uint8", (75, 8)),
        ("kimi_k2", "kimi-k2.7", range(1, 61), "uint16", (60, 8)),
        ("nemotron3", "nemotron-3-ultra", None, "uint16", (48, 22)),
    ],
)
def test_full_sizes_route_where_their_checkpoints_do(
    plugin: str, model: str, layers: Any, dtype: str, row: Any
) -> None:
    composition = compose(SPELL, plugins=plugin, overrides=[f"model.type={model}", "model.size=full"])
    routing = replayed(composition)
    assert routing is not None
    assert (routing.dtype, routing.row) == (dtype, row)
    if layers is not None:
        assert routing.indices == tuple(layers)


def test_a_dense_model_cannot_be_told_to_replay() -> None:
    with pytest.raises(ConfigError, match="'qwen3' is dense as configured: it has no experts to send tokens to"):
        compose(SPELL, overrides=["trainer.router_replay=on"])


# --- of a turn in two parts -------------------------------------------------------------------------------------------
def rows(start: int, count: int, **changes: Any) -> Routes:
    experts = (np.arange(start, start + count)[:, None, None] + np.zeros((1, 2, 2))).astype(np.uint8)
    made = Routes(layers=("a", "b"), experts=experts, versions=np.full(count, 7, np.int32), start=start)
    return attrs.evolve(made, **changes)


def test_routes_of_two_parts_are_those_of_the_whole() -> None:
    whole, first = rows(3, 9), until(rows(3, 9), 8)
    assert first is not None
    assert (first.start, len(first.experts), len(first.versions)) == (3, 5, 5)
    both = joined(first, rows(8, 4))
    assert both is not None
    np.testing.assert_array_equal(both.experts, whole.experts)
    np.testing.assert_array_equal(both.versions, whole.versions)
    assert (both.start, both.layers) == (3, ("a", "b"))


def test_routes_that_do_not_follow_on_stay_unknown() -> None:
    first = rows(3, 5)
    for second in (rows(9, 3), rows(8, 4, layers=("b", "a"))):
        assert joined(first, second) is first
    assert joined(first, None) is first
    assert joined(None, first) is first
    assert (joined(None, None), until(None, 4)) == (None, None)
