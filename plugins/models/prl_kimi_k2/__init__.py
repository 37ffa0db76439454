"""Kimi-K2, Kimi-K2.5 and Kimi-K2.7 (Kimi Team 2025 and 2026, arXiv:2507.20534 and arXiv:2602.02276), language part.

Multi-head latent attention with yarn positions, and experts behind a sigmoid router. The vision parts of K2.5 and later
are no part of the network; checkpoints keep them (`WeightMap.carried`).
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from prl import hookimpl, option
from prl.families.deepseek_v3 import DeepSeekV3Config
from prl.providers import Model

from prl_kimi_k2.render import SPECIAL_TOKENS, KimiK2Format


@attrs.frozen(kw_only=True)
class KimiConfig(DeepSeekV3Config):
    """What the `[model]` sections of this family share."""


@attrs.frozen(kw_only=True)
class KimiK2Config(KimiConfig):
    """`[model]` with `type = "kimi-k2"`."""


@attrs.frozen(kw_only=True)
class KimiK25Config(KimiConfig):
    """`[model]` with `type = "kimi-k2.5"`."""

    thinking: bool = option(True, help="the assistant is invited to reason first")


@attrs.frozen(kw_only=True)
class KimiK27Config(KimiConfig):
    """`[model]` with `type = "kimi-k2.7"`."""


@hookimpl
def prl_models() -> Iterable[Model]:
    yield _model("kimi-k2", KimiK2Config, "kimi_k2", KimiK2Format.markers)
    yield _model("kimi-k2.5", KimiK25Config, "kimi_k2_5", SPECIAL_TOKENS)
    yield _model("kimi-k2.7", KimiK27Config, "kimi_k2_7", SPECIAL_TOKENS)


def _model(name: str, config: type[KimiConfig], renderer: str, special_tokens: tuple[str, ...]) -> Model:
    return Model(
        name=name,
        config=config,
        summary=f"{name.title()}: latent attention, 384 experts, 1T parameters; or a toy of the same make",
        build="prl_kimi_k2.network:build",
        weights="prl_kimi_k2.weights:weight_map",
        limits="prl_kimi_k2.sizes:limits",
        render=f"prl_kimi_k2.render:{renderer}",
        special_tokens=special_tokens,
        routing="prl_kimi_k2.sizes:routing",
        float32=("e_score_correction_bias",),
        unquantized=(r"\b(embed_tokens|lm_head|mlp\.gate)\.weight$", r"^(vision_tower|mm_projector)\."),
        checkpoint_types=("kimi_k2", "deepseek_v3") if config is KimiK2Config else ("kimi_k25",),
    )
