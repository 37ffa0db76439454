"""Nemotron-3 Nano, Super and Ultra (NVIDIA 2025 and 2026; Super: arXiv:2604.12374).

A hybrid of single mixers: Mamba-2 layers, a few layers of grouped-query attention without positions, and layers of
ungated experts, which in Super and Ultra work on a latent. The block that predicts further tokens is no part of the
network; checkpoints keep it (`WeightMap.carried`).
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from attrs import validators
from prl import hookimpl, option
from prl.families.moe import MoeConfig
from prl.providers import Model

from prl_nemotron3.render import SPECIAL_TOKENS


@attrs.frozen(kw_only=True)
class NemotronConfig(MoeConfig):
    """What the `[model]` sections of this family share."""

    pattern: str = option(
        "",
        help="a letter per layer, if not the size's: M Mamba-2, * attention, E experts",
        validator=validators.matches_re(r"[ME*]*"),
    )
    thinking: bool = option(True, help="the assistant is invited to reason first")


@attrs.frozen(kw_only=True)
class NanoConfig(NemotronConfig):
    """`[model]` with `type = "nemotron-3-nano"`."""


@attrs.frozen(kw_only=True)
class SuperConfig(NemotronConfig):
    """`[model]` with `type = "nemotron-3-super"`."""


@attrs.frozen(kw_only=True)
class UltraConfig(NemotronConfig):
    """`[model]` with `type = "nemotron-3-ultra"`."""


@hookimpl
def prl_models() -> Iterable[Model]:
    yield _model("nano", NanoConfig, "nemotron_3", "32B")
    yield _model("super", SuperConfig, "nemotron_3", "121B")
    yield _model("ultra", UltraConfig, "nemotron_3_ultra", "549B")


def _model(name: str, config: type[NemotronConfig], renderer: str, parameters: str) -> Model:
    return Model(
        name=f"nemotron-3-{name}",
        config=config,
        summary=f"Nemotron-3-{name.title()}: Mamba-2, attention and experts, {parameters} parameters; or a toy",
        build="prl_nemotron3.network:build",
        weights="prl_nemotron3.weights:weight_map",
        limits="prl_nemotron3.sizes:limits",
        render=f"prl_nemotron3.render:{renderer}",
        special_tokens=SPECIAL_TOKENS,
        routing="prl_nemotron3.sizes:routing",
        float32=("e_score_correction_bias", "mixer.A_log", "mixer.D", "mixer.dt_bias"),
        unquantized=(
            r"\b(embeddings|lm_head|mixer\.gate)\.weight$",
            r"\b(q_proj|k_proj|v_proj|o_proj|fc1_latent_proj|fc2_latent_proj)\.weight$",
            r"^mtp\.",
        ),
        checkpoint_types=("nemotron_h",),
    )
