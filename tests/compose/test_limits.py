"""Limits of a model's shape: data of the plugins, and what `prl config check` says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
from prl.compose import limits
from prl.compose.compose import compose
from prl.compose.config import Run, TrainerSection
from prl.errors import ConfigError, Problem
from prl.providers import Limit
from prl_glm5.sizes import limits as glm5
from prl_kimi_k2 import KimiK27Config
from prl_kimi_k2.sizes import limits as kimi_k2
from prl_nemotron3 import UltraConfig
from prl_nemotron3.sizes import limits as nemotron3
from prl_qwen3 import Qwen3Config
from prl_qwen3.sizes import limits as qwen3

from prl_glm5 import Glm51Config  # isort: skip

CONFIG = Path(__file__).parents[2] / "configs" / "spell_backward.toml"
PUBLISHED = {
    "glm-5.1": glm5(Glm51Config(size="full"), 0),
    "kimi-k2.7": kimi_k2(KimiK27Config(size="full"), 0),
    "nemotron-3-ultra": nemotron3(UltraConfig(size="full"), 0),
    "qwen3": qwen3(Qwen3Config(), 8),
}


@pytest.mark.parametrize(
    ("model", "expert", "tensor", "context"),
    [
        ("glm-5.1", 256, [1, 2, 4, 8, 16, 32], []),
        ("kimi-k2.7", 384, [1, 2, 4, 8, 16, 32, 64], []),
        ("nemotron-3-ultra", 512, [1, 2, 4, 8], []),
        ("qwen3", 1, [1, 2], []),
    ],
)
def test_what_the_published_shapes_allow(model: str, expert: int, tensor: list[int], context: list[int]) -> None:
    assert limits.possible(PUBLISHED[model], "expert")[-1] == expert
    assert limits.possible(PUBLISHED[model], "tensor") == tensor
    assert limits.possible(PUBLISHED[model], "context") == context


def test_every_degree_that_cannot_be_is_told_with_all_that_is_in_its_way() -> None:
    degrees: dict[Any, tuple[str, int]] = {
        "expert": ("trainer.expert", 48),
        "tensor": ("trainer.tensor", 128),
        "context": ("trainer.context", 8),
    }
    powers = ", ".join(str(2**i) for i in range(10))
    heads = "128 does not divide 64 attention heads and 8 groups of Mamba-2"
    assert limits.problems(PUBLISHED["nemotron-3-ultra"], degrees) == [
        Problem("trainer.expert", f"48 does not divide 512 experts; possible: {powers}"),
        Problem("trainer.tensor", f"{heads}; possible: 1, 2, 4, 8"),
    ]
    alone = [Limit(degree="expert", of="experts", count=1, reason="it is dense")]
    assert limits.problems(alone, {"expert": ("trainer.expert", 2)}) == [
        Problem("trainer.expert", "2 does not divide 1 experts (it is dense); possible: 1")
    ]


@attrs.frozen(kw_only=True)
class Meshed(TrainerSection):
    """A trainer section with degrees of parallelism."""

    context: int = 1
    expert: int = 1


def test_the_degrees_of_the_trainer_are_checked() -> None:
    composition = compose(CONFIG)
    run: Run = attrs.evolve(composition.run, model=Qwen3Config(experts=6), trainer=Meshed(expert=4))
    stated, unreadable = limits.of_model(run, composition.registry)
    assert unreadable == []
    assert limits.of_trainer(run, stated) == [
        Problem("trainer.expert", "4 does not divide 6 experts; possible: 1, 2, 3, 6")
    ]


def test_heads_are_asked_for_by_ulysses_alone() -> None:
    composition = compose(CONFIG)

    def found(choice: str) -> list[Problem]:
        trainer = attrs.evolve(composition.run.trainer, ranks=3, context=3, context_attention=choice)
        stated, _ = limits.of_model(composition.run, composition.registry)
        return limits.of_trainer(attrs.evolve(composition.run, trainer=trainer), stated)

    assert found("auto") == found("gather") == []
    assert found("ulysses") == [Problem("trainer.context", "3 does not divide 4 attention heads; possible: 1, 2, 4")]


def test_an_impossible_model_is_told_beside_other_problems() -> None:
    edits = ["model.type=kimi-k2.7", "model.experts_per_token=9", "rollouts.min_tokens=99999"]
    with pytest.raises(ConfigError) as caught:
        compose(CONFIG, plugins="kimi_k2", overrides=edits)
    assert "model.experts_per_token must be <= 8 experts: 9" in str(caught.value)
    assert "rollouts.min_tokens" in str(caught.value)
