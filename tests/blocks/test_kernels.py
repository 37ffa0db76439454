"""Seams: what a config chooses is what is computed, and what cannot run here says why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from prl.blocks import kernels
from prl.blocks.context import Context
from prl.blocks.kernels import SEAMS
from prl.compose.compose import compose
from prl.compose.config import KernelConfig, KernelsSection
from prl.errors import ConfigError, UserError
from prl.providers import Kernel
from prl_glm5 import Glm51Config
from prl_glm5 import network as glm
from prl_nemotron3 import UltraConfig
from prl_nemotron3 import network as nemotron

CPU = torch.device("cpu")
SPELL = Path(__file__).parents[2] / "configs" / "spell_backward.toml"
GLM = Glm51Config(hidden_size=32, layers=2, index_top_k=4)
ULTRA = UltraConfig(hidden_size=32, pattern="M*E")


@pytest.fixture(autouse=True)
def _references_again() -> Iterator[None]:
    yield
    for seam in SEAMS.values():
        seam.chosen = seam.reference


def run_with(device: str | None = None, **sections: KernelConfig) -> Any:
    """A composition whose kernel counts its calls and computes what the reference does."""
    section = KernelConfig()
    provider = Kernel(name="counting", config=KernelConfig, seam="", summary="", build="", device=device)
    chosen = KernelsSection(**dict.fromkeys(sections, section))
    run = SimpleNamespace(kernels=chosen)
    return SimpleNamespace(run=run, provider=lambda _: provider, build=lambda _: sections[next(iter(sections))])


def forward() -> list[torch.Tensor]:
    """Every operation of the three families, in two models."""
    made = []
    for build, config in ((glm.build, GLM), (nemotron.build, ULTRA)):
        torch.manual_seed(0)
        model = build(config, 20)  # type: ignore[operator]
        made.append(model.hidden(torch.arange(12), Context.packed(torch.tensor([0, 5, 12]))))
    return made


@pytest.mark.parametrize("name", [field.name for field in attrs.fields(KernelsSection)])
def test_what_is_chosen_computes(name: str) -> None:
    kernels.install(run_with(), CPU)
    expected, calls = forward(), 0

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return SEAMS[name].reference(*args, **options)

    kernels.install(run_with(**{name: counting}), CPU)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(forward(), expected, strict=True))
    assert calls > 0
    seen = calls
    kernels.install(run_with(), CPU)
    forward()
    assert calls == seen


def test_a_kernel_for_another_device_says_so() -> None:
    with pytest.raises(UserError, match=r"kernels\.attend: kernel 'counting' is unavailable: it needs cuda, .* on cpu"):
        kernels.install(run_with("cuda", attend=KernelConfig()), CPU)


def test_a_config_chooses_a_kernel_for_its_own_operation_alone() -> None:
    composition = compose(SPELL, plugins="packed_topk", overrides=["kernels.select_topk.type=packed"])
    kernels.install(composition, CPU)
    assert SEAMS["select_topk"].chosen is not SEAMS["select_topk"].reference
    assert all(s.chosen is s.reference for name, s in SEAMS.items() if name != "select_topk")
    with pytest.raises(ConfigError, match=r"kernels\.attend +kernel 'packed' computes select_topk, not attend"):
        compose(SPELL, plugins="packed_topk", overrides=["kernels.attend.type=packed"])
    with pytest.raises(ConfigError, match="installed plugin 'packed_topk' provides it but this run does not name it"):
        compose(SPELL, overrides=["kernels.select_topk.type=packed"])
