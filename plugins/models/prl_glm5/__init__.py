"""GLM-5, GLM-5.1 and GLM-5.2 (GLM Team 2026, arXiv:2602.15763).

Multi-head latent attention over the tokens an indexer selects, and experts behind a sigmoid router. In GLM-5.2 most
layers share the selection of an earlier one. The block that predicts further tokens is no part of the network;
checkpoints keep it (`WeightMap.carried`).
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from prl import hookimpl, option
from prl.families.deepseek_v3 import DeepSeekV3Config
from prl.families.moe import positive
from prl.providers import Model

from prl_glm5.render import SPECIAL_TOKENS


@attrs.frozen(kw_only=True)
class GlmConfig(DeepSeekV3Config):
    """What the `[model]` sections of this family share."""

    index_top_k: int | None = option(
        None, help="tokens that attention sees of those before, if not the size's", validator=positive
    )
    thinking: bool = option(True, help="the assistant is invited to reason first")


@attrs.frozen(kw_only=True)
class Glm5Config(GlmConfig):
    """`[model]` with `type = "glm-5"`."""


@attrs.frozen(kw_only=True)
class Glm51Config(GlmConfig):
    """`[model]` with `type = "glm-5.1"`."""


@attrs.frozen(kw_only=True)
class Glm52Config(GlmConfig):
    """`[model]` with `type = "glm-5.2"`."""


@hookimpl
def prl_models() -> Iterable[Model]:
    yield _model("glm-5", Glm5Config, "glm_5")
    yield _model("glm-5.1", Glm51Config, "glm_5_1")
    yield _model("glm-5.2", Glm52Config, "glm_5_2")


def _model(name: str, config: type[GlmConfig], renderer: str) -> Model:
    return Model(
        name=name,
        config=config,
        summary=f"{name.upper()}: sparse latent attention, 256 experts, 744B parameters; or a toy of the same make",
        build="prl_glm5.network:build",
        weights="prl_glm5.weights:weight_map",
        limits="prl_glm5.sizes:limits",
        render=f"prl_glm5.render:{renderer}",
        special_tokens=SPECIAL_TOKENS,
        routing="prl_glm5.sizes:routing",
        float32=("e_score_correction_bias",),
        unquantized=(
            r"\b(embed_tokens|lm_head|shared_head\.head)\.weight$",
            r"\b(mlp\.gate|indexer\.weights_proj|eh_proj)\.weight$",
        ),
        checkpoint_types=("glm_moe_dsa",),
    )
