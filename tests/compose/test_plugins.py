"""Loading: isolated, checked, in the order asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import prl
import pytest
from prl.compose.discover import installed
from prl.compose.plugins import LIFECYCLE, REGISTRATION, Failure, Hooks

Throwaway = Callable[..., Path]

LOSS = """
    import attrs
    from prl import hookimpl
    from prl.compose.config import LossConfig
    from prl.providers import Loss

    @attrs.frozen(kw_only=True)
    class Config(LossConfig):
        pass

    @hookimpl
    def prl_losses():
        return [Loss(name="{name}", config=Config, summary="", build="x:y", replaces={replaces!r})]
"""


def reason(name: str) -> str:
    (failure,) = Hooks().load([name], installed())
    return failure.reason


def test_every_kind_has_its_registration_hook() -> None:
    assert len(REGISTRATION) == 12
    assert {
        "prl_run_start",
        "prl_group_done",
        "prl_step_end",
        "prl_weights_published",
        "prl_checkpoint_saved",
        "prl_run_end",
    } == LIFECYCLE


def test_a_plugin_that_is_not_installed_gets_the_nearest_name(throwaway_plugin: Throwaway) -> None:
    throwaway_plugin("memtrace", "")
    assert reason("memtrac") == "not installed (did you mean 'memtrace'?)"
    assert reason("zzzzzz") == "not installed"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import deep_ep_not_here", "ModuleNotFoundError: No module named 'deep_ep_not_here'"),
        (
            "from prl import hookimpl\n@hookimpl\ndef prl_lossess(): return []",
            "unknown hook 'prl_lossess' (did you mean 'prl_losses'?)",
        ),
        (
            "from prl import hookimpl\n@hookimpl(wrapper=True)\ndef prl_losses(): return (yield)",
            "prl_losses is a wrapper; prl hooks take none, since one could rewrite another plugin's answer",
        ),
        ("def prl_losses(): return []", "prl_losses is not marked with @prl.hookimpl, so it would never be called"),
    ],
)
def test_a_broken_plugin_fails_with_its_reason(throwaway_plugin: Throwaway, source: str, expected: str) -> None:
    throwaway_plugin("boom", source)
    assert reason("boom") == expected


def test_an_argument_that_the_hook_does_not_have_is_named(throwaway_plugin: Throwaway) -> None:
    throwaway_plugin("badarg", "from prl import hookimpl\n@hookimpl\ndef prl_step_end(step, loss): pass")
    assert "Argument(s) {'loss'}" in reason("badarg")


def test_a_broken_plugin_harms_no_other(throwaway_plugin: Throwaway) -> None:
    throwaway_plugin("boom", "raise RuntimeError('no')")
    throwaway_plugin("fine", LOSS.format(name="fine", replaces=None))
    hooks = Hooks()
    assert hooks.load(["boom", "fine"], installed()) == [Failure("boom", "RuntimeError: no")]
    records, failures = hooks.provided()
    assert [(r.plugin, r.kind, r.provider.name) for r in records] == [("fine", "loss", "fine")]
    assert failures == []


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        ("prl<0.1,>=0.0.1", f"needs prl<0.1,>=0.0.1, this is prl {prl.__version__}"),
        ("prl>=0.1,<0.2", None),
        ("PRL>=99; extra == 'future'", None),
        ("prl>=99; python_version < '3'", None),
        ("prl-other>=99", None),
    ],
)
def test_a_distributions_requirement_on_prl_is_checked(
    throwaway_plugin: Throwaway, requirement: str, expected: str | None
) -> None:
    throwaway_plugin("old", "", requires=[requirement])
    failures = Hooks().load(["old"], installed())
    assert [(f.reason, f.status) for f in failures] == ([(expected, "incompatible")] if expected else [])


def test_two_distributions_that_claim_one_name_are_both_named(throwaway_plugin: Throwaway) -> None:
    throwaway_plugin("grpo", "", distribution="prl_one")
    throwaway_plugin("grpo", "", distribution="prl_two")
    assert reason("grpo") == "claimed by distributions prl-one and prl-two; uninstall one of them"


def test_hooks_are_called_in_the_order_of_the_list_with_the_arguments_they_declare(
    throwaway_plugin: Throwaway,
) -> None:
    for name, arguments in (("first", "step"), ("second", "metrics, version")):
        throwaway_plugin(
            name,
            "from prl import hookimpl\nseen = []\n@hookimpl(tryfirst=True)\n"
            f"def prl_step_end({arguments}): seen.append(list(locals().items()))",
        )
    hooks = Hooks()
    hooks.load(["second", "first"], installed())
    found = hooks.implementations("prl_step_end")
    assert [plugin for plugin, _ in found] == ["second", "first"]
    for _, function in found:
        function(step=3, version=4, metrics={"x": 1.0})
    import prl_first
    import prl_second

    assert prl_first.seen == [[("step", 3)]]
    assert prl_second.seen == [[("metrics", {"x": 1.0}), ("version", 4)]]


def test_only_lifecycle_hooks_are_handed_out() -> None:
    with pytest.raises(ValueError, match="prl_losses is not a lifecycle hook"):
        Hooks().implementations("prl_losses")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return [3]", "prl_losses: TypeError: expected Loss records, got 3"),
        ("raise KeyError('x')", "prl_losses: KeyError: 'x'"),
        (
            "from prl.providers import Loss; return [Loss(name='x', config=int, summary='', build='')]",
            "prl_losses: TypeError: config of 'x' must be an attrs class, got <class 'int'>",
        ),
        (
            "from prl.providers import Loss, Loss as C; return [Loss(name='x', config=C, summary='', build='a.b')]",
            "prl_losses: TypeError: build of 'x' must be \"package.module:attribute\", got 'a.b'",
        ),
    ],
)
def test_what_a_registration_hook_returns_is_checked(throwaway_plugin: Throwaway, body: str, expected: str) -> None:
    throwaway_plugin("odd", f"from prl import hookimpl\n@hookimpl\ndef prl_losses(): {body}")
    hooks = Hooks()
    hooks.load(["odd"], installed())
    assert hooks.provided() == ([], [Failure("odd", expected)])
