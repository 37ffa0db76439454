"""The folder vLLM loads a run's model from: its config.json, no weights and no tokenizer. And what it must be sent."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs
import numpy as np
import torch
from prl.blocks import precision
from prl.blocks.form import Form
from prl.errors import InfrastructureError, UserError
from prl.providers import Model, NumberFormat, WeightMap
from prl.serve.speech import Speech
from prl.types import Manifest

if TYPE_CHECKING:
    from prl.compose.compose import Composition
    from prl.compose.routing import Routing


@attrs.frozen(kw_only=True)
class Described:
    """What the engine process knows of the model; vLLM has the model itself."""

    speech: Speech
    hf_config: Mapping[str, Any]
    dtype: str
    """vLLM's name of the serving dtype."""
    shapes: dict[str, tuple[int, ...]]
    """Name -> shape of every tensor that a version consists of."""

    @property
    def latent(self) -> bool:
        """Keys and values are kept as latents (MLA)."""
        return "kv_lora_rank" in self.hf_config

    @property
    def recurrent(self) -> bool:
        """Some layers keep a state in the place of keys and values (Mamba-2)."""
        return "ssm_state_size" in self.hf_config

    def route_bytes(self, routing: Routing | None) -> int:
        """Of one token, in vLLM's table, which has a place for every decoder layer; 0 where no routes are wanted."""
        if routing is None:
            return 0
        layers: int = self.hf_config["num_hidden_layers"]
        return layers * routing.experts_per_token * np.dtype(routing.dtype).itemsize


def describe(composition: Composition) -> Described:
    """From the config alone: the module is built without memory."""
    run = composition.run
    provider = cast(Model, composition.provider(run.model))
    speech = Speech.of(composition)
    vocab_size = speech.tokenizer.vocab_size
    weight_map: WeightMap = composition.load(provider.weights)(run.model, vocab_size)
    number_format: NumberFormat = composition.build(run.quantization)
    form = Form.of_family(provider, number_format)
    with torch.device("meta"):
        module = composition.build(run.model, vocab_size)
    precision.cast(module, number_format.serve_dtype, float32=provider.float32)
    sent = [
        tensor
        for name, whole in module.state_dict().items()
        for hf_name, part in weight_map.to_hf(name, whole)
        for tensor in form.apply(hf_name, part)
    ]
    return Described(
        speech=speech,
        hf_config=form.declared(weight_map.hf_config(), sent),
        dtype=str(number_format.serve_dtype).removeprefix("torch."),
        shapes={name: tuple(tensor.shape) for name, tensor in sent},
    )


def write(described: Described, folder: Path, *, length: int, cpu: bool) -> Path:
    """The folder, with what vLLM needs in it to serve sequences of `length` tokens.

    UserError for what vLLM's CPU backend cannot serve.
    """
    if cpu and "quantization_config" in described.hf_config:
        raise UserError("vLLM's CPU backend serves no quantised weights: use quantization fp32 or bf16, or GPUs")
    folder.mkdir(parents=True, exist_ok=True)
    config = _dense(described.hf_config, length) if cpu and "index_topk" in described.hf_config else described.hf_config
    partial = folder / f"config.json.{secrets.token_hex(4)}"
    partial.write_text(json.dumps(config, indent=2))
    partial.replace(folder / "config.json")  # at once: the engines of a run share the folder
    return folder


def _dense(hf_config: Mapping[str, Any], length: int) -> dict[str, Any]:
    """A model with sparse attention for vLLM's CPU backend, which has none.

    Attention that chooses `index_topk` tokens is dense attention where there are no more to choose from: then the model
    is one of the DeepSeek-V3 family, whose loader ignores the indexers' weights. UserError for longer sequences.
    """
    chosen = hf_config["index_topk"]
    if length > chosen:
        raise UserError(
            f"vLLM has no sparse attention on CPUs, and sequences of {length} tokens are longer than the {chosen} that "
            "this model attends to: lower rollouts.sequence_length, raise model.index_top_k, or serve it on GPUs"
        )
    kept = {key: value for key, value in hf_config.items() if not key.startswith("index")}
    return {**kept, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}


def check(manifest: Manifest, shapes: dict[str, tuple[int, ...]]) -> None:
    """InfrastructureError names what a version lacks, or has in another shape, or has too much."""
    what = f"version {manifest.version} at {manifest.where}"
    sent = {record.name: record.shape for record in manifest.tensors}
    for name, shape in shapes.items():
        if name not in sent:
            raise InfrastructureError(f"{what} lacks {name}, which the model needs")
        if tuple(sent[name]) != shape:
            raise InfrastructureError(f"{what} has {name} of shape {tuple(sent[name])}, the model needs {shape}")
    if strange := sent.keys() - shapes.keys():
        raise InfrastructureError(f"{what} has {min(strange)}, which is no part of the model")
