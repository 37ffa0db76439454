"""What is computed again, or compiled, computes the same; by one rank here, by several in parallel/test_meshes.py."""

from __future__ import annotations

import pytest
import torch
from prl.blocks.decoder import Layer
from prl.compose.config import TrainerSection
from prl.errors import UserError
from prl.train import layers

from tests.train.tiny import (
    GradientRecorder,
    TinyModel,
    build_qwen3,
    build_stepper,
    pack_batch,
    random_samples,
    relative_difference,
)


def gradients(prepare) -> dict[str, torch.Tensor]:
    """Of a model that `prepare` has changed."""
    model = build_qwen3()
    prepare(model)
    recorder = GradientRecorder(model.named_parameters())
    batch = pack_batch(random_samples(4))
    build_stepper(model, recorder).step(batch, batch.ranks[0], 0.0)
    return recorder.gradients


def compiled(model: torch.nn.Module) -> None:
    """Traced and differentiated by torch's compiler, then run operation by operation: no C++ is built."""
    for layer in model.layers:
        layer.compile_mix(backend="aot_eager", fullgraph=True)


def checkpointed_and_compiled(model: torch.nn.Module) -> None:
    compiled(model)
    layers.apply(model, TrainerSection(activation_checkpointing="full"))


@pytest.mark.parametrize("prepare", [compiled, checkpointed_and_compiled])
def test_compiled_layers_compute_the_same_without_a_break(prepare):
    assert relative_difference(gradients(prepare), gradients(lambda model: None)) < 1e-5


@pytest.mark.parametrize("settings", [{"activation_checkpointing": "full"}, {"recompute": ("mlp",)}], ids=str)
def test_activations_are_computed_again_in_the_backward_pass(settings):
    """Forward calls of the first layer's feed-forward: once, and once more where it is computed again."""
    calls = {}
    for name, section in (("kept", {}), ("again", {"activation_checkpointing": "selective", **settings})):
        model = build_qwen3()
        layers.apply(model, TrainerSection(**section))
        seen: list[int] = []
        model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        batch = pack_batch(random_samples(4))
        build_stepper(model, GradientRecorder(model.named_parameters())).step(batch, batch.ranks[0], 0.0)
        calls[name] = len(seen)
    assert calls == {"kept": 1, "again": 2}


def test_layers_of_another_make_are_refused():
    with pytest.raises(UserError, match=r"TinyModel has CausalMean"):
        layers.apply(TinyModel(), TrainerSection(compile=True))
    layers.apply(TinyModel(), TrainerSection())


def test_experts_in_float32_are_not_compiled():
    model = build_qwen3(experts=4)
    layers.apply(model, TrainerSection(compile=True))
    assert [layer._compiled for layer in model.layers] == [False, False]
    dense = build_qwen3()
    layers.apply(dense, TrainerSection(compile=True))
    assert all(isinstance(layer, Layer) and layer._compiled for layer in dense.layers)
