"""Providers by kind and name."""

from __future__ import annotations

import attrs
import pytest
from prl.compose.config import LossConfig, SchedulerConfig
from prl.compose.plugins import Provided
from prl.compose.registry import build
from prl.providers import Loss


def loss_config() -> type:
    return attrs.make_class("Config", {}, bases=(LossConfig,), frozen=True)


def loss(plugin: str, name: str, *, config: type | None = None, replaces: str | None = None) -> Provided:
    record = Loss(name=name, config=config or loss_config(), summary="", build=f"{plugin}:f", replaces=replaces)
    return Provided(plugin, "loss", record)


def test_providers_are_found_by_kind_name_config_and_reference() -> None:
    one, two = loss("a", "one"), loss("b", "two")
    registry, failures = build([two, one])
    assert failures == []
    assert registry.names("loss") == ["one", "two"]
    assert registry.names("model") == []
    assert registry.find("loss", "one") is one
    assert registry.find("model", "one") is None
    assert registry.of_config(two.provider.config) is two
    assert registry.of_ref("b:f") is two
    with pytest.raises(LookupError):
        registry.of_config(int)


def test_a_conflict_names_both_sides_and_both_ways_out() -> None:
    _, failures = build([loss("grpo", "x"), loss("grpo2", "x")])
    assert [(f.plugin, f.reason) for f in failures] == [
        (
            "grpo2",
            "loss 'x' is provided by plugins grpo and grpo2; drop one (--plugins no:grpo) "
            'or have one declare replaces="grpo:x"',
        )
    ]


@pytest.mark.parametrize("order", [1, -1])
def test_replaces_wins_in_any_order(order: int) -> None:
    records = [loss("old", "x"), loss("new", "x", replaces="old:x")][::order]
    registry, failures = build(records)
    found = registry.find("loss", "x")
    assert failures == []
    assert found is not None
    assert found.plugin == "new"


def test_replacing_somebody_else_is_still_a_conflict() -> None:
    _, failures = build([loss("old", "x"), loss("new", "x", replaces="other:x")])
    assert len(failures) == 1


def test_a_config_class_belongs_to_one_provider() -> None:
    shared = loss_config()
    _, failures = build([loss("a", "one", config=shared), loss("a", "two", config=shared)])
    assert [f.reason for f in failures] == ["loss 'two' and 'one' share the config class Config"]


def test_a_config_class_derives_from_its_kinds_base() -> None:
    foreign = attrs.make_class("Config", {}, bases=(SchedulerConfig,), frozen=True)
    _, failures = build([loss("a", "one", config=foreign)])
    assert [f.reason for f in failures] == ["config of loss 'one' must derive from LossConfig"]
