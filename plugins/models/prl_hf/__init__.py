"""Any causal model of transformers, for what no plugin lists: small models at transformers' speed.

It trains and decodes in the same packed layout as the others, but knows no kernels, no routes and no expert or tensor
parallelism: a family worth more has a plugin of its own. Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import attrs
from prl import hookimpl, option
from prl.compose.config import ModelConfig, Run
from prl.providers import Model


@attrs.frozen(kw_only=True)
class HfConfig(ModelConfig):
    """`[model]` with `type = "hf"`."""

    checkpoint: str = option(help="folder with a Hugging Face config.json that says which model it is, and every size")


@hookimpl
def prl_models() -> Iterable[Model]:
    yield Model(
        name="hf",
        config=HfConfig,
        summary="any causal model of transformers, from its config.json; no expert parallelism, chats in ChatML",
        requires=("transformers",),
        build="prl_hf.network:build",
        weights="prl_hf.weights:weight_map",
        render="prl_hf.chat:renderer",
        limits="prl_hf.limits:limits",
        special_tokens=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        float32=("inv_freq",),
        unquantized=(r"embed|lm_head|\bw[tp]e\b",),
    )


@hookimpl
def prl_validate(run: Run) -> Iterable[str]:
    model = run.model
    if isinstance(model, HfConfig) and not (Path(model.checkpoint) / "config.json").is_file():
        yield f"model.checkpoint: {model.checkpoint!r} is no folder with a config.json"
