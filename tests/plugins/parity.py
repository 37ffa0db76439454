"""What the tests of model families share: random weights, comparison with transformers and with themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from prl.blocks import checkpoint
from prl.blocks.context import Context
from prl.blocks.decoder import Decoder
from prl.blocks.linear import linear
from prl.providers import WeightMap
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"

VOCAB = 96


@torch.no_grad()
def randomise(model: Decoder, seed: int = 0) -> Decoder:
    """Weights large enough for uneven distributions; norms that are not one, routers' corrections that are not zero."""
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith(("A_log", "dt_bias")):
            tensor.add_(torch.randn(tensor.shape, generator=draw) * 0.2)
        elif name.endswith("bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.05)
        elif tensor.dim() == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
        else:
            scale = 0.3 if name.endswith("conv1d.weight") else 0.05
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * scale)
    return model


def packed(*lengths: int) -> Context:
    return Context.packed(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]))


def logits(model: Decoder, tokens: Tensor, context: Context) -> Tensor:
    return linear(model.hidden(tokens, context), model.head())


def some_tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def written(model: Decoder, weight_map: WeightMap, folder: Path, **options: Any) -> Path:
    checkpoint.save(model.state_dict().items(), weight_map, folder, **options)
    return folder


def assert_same_logits_and_gradients(
    model: Decoder, reference: Any, expected: Mapping[str, Any], weight_map: WeightMap, *, length: int, seed: int
) -> None:
    """Logits within 5e-6, gradients within 2e-6; `expected` are the reference's parameters by published name."""
    tokens, targets = some_tokens(length, seed), some_tokens(length, seed + 10)
    own, theirs = logits(model, tokens, packed(length)), reference(input_ids=tokens[None], use_cache=False).logits[0]
    torch.testing.assert_close(own, theirs, atol=5e-6, rtol=0)
    for output in (own, theirs):
        torch.nn.functional.cross_entropy(output, targets).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            for hf_name, view in weight_map.to_hf(name, parameter.grad):
                torch.testing.assert_close(view, gradient(expected, hf_name), atol=2e-6, rtol=0, msg=hf_name)


def gradient(parameters: Mapping[str, Any], name: str) -> Tensor:
    """transformers 5 stacks experts in memory: [E, 2 F, D] or, without a gate, [E, F, D]; and [E, D, F]."""
    stem, experts, rest = name.partition(".experts.")
    if not experts:
        alone: Tensor = parameters[name].grad
        return alone
    expert, projection, _ = rest.split(".")
    if f"{stem}.experts.{projection}" in parameters:
        stacked: Tensor = parameters[f"{stem}.experts.{projection}"].grad
        return stacked[int(expert)]
    gate, up = parameters[f"{stem}.experts.gate_up_proj"].grad[int(expert)].chunk(2)
    return gate if projection == "gate_proj" else up  # type: ignore[no-any-return]


@torch.no_grad()
def assert_packing_changes_nothing(model: Decoder, lengths: Sequence[int]) -> None:
    tokens = some_tokens(sum(lengths))
    together = logits(model, tokens, packed(*lengths))
    alone = torch.cat([logits(model, part, packed(len(part))) for part in tokens.split(list(lengths))])
    torch.testing.assert_close(together, alone, atol=5e-6, rtol=0)


@torch.inference_mode()
def assert_steps_equal_the_whole(model: Decoder, *, copied: int) -> None:
    """Ragged prompts in chunks, decoding, a later turn: all as one forward pass over everything.

    Then the first `copied` tokens of a row go on in another (all 23 computed ones when the caches are not reusable in
    part).
    """
    texts = [some_tokens(40, seed=seed) for seed in range(3)]
    expected = [logits(model, text, packed(40)) for text in texts]
    caches = model.new_caches(rows=5, length=48)
    past = [0, 0, 0]
    for lengths in [(6, 9, 2), (3, 1, 8), (1, 1, 1), (1, 1, 1), (4, 0, 5), (1, 1, 1), (7, 20, 9)]:
        context = Context.cached(caches, lengths=lengths, rows=slice(1, 4), past=past)
        tokens = torch.cat([t[p : p + n] for t, p, n in zip(texts, past, lengths, strict=True)])
        wanted = torch.cat([e[p : p + n] for e, p, n in zip(expected, past, lengths, strict=True)])
        torch.testing.assert_close(logits(model, tokens, context), wanted, atol=1e-5, rtol=0)
        past = [p + n for p, n in zip(past, lengths, strict=True)]
    assert past[0] == 23
    for cache in caches:
        if cache is not None:
            cache.copy_row(1, 4, copied)
    rest = Context.cached(caches, lengths=(40 - copied,), rows=torch.tensor([4]), past=(copied,))
    torch.testing.assert_close(logits(model, texts[0][copied:], rest), expected[0][copied:], atol=1e-5, rtol=0)
    _fresh_row(model, caches, texts[2][:11], expected[2][:11])


def _fresh_row(model: Decoder, caches: list[Any], tokens: Tensor, expected: Tensor) -> None:
    """A row that held another sequence begins a new one, beside one that decodes on."""
    fresh = Context.cached(caches, lengths=(11,), rows=torch.tensor([1]), past=(0,))
    torch.testing.assert_close(logits(model, tokens, fresh), expected, atol=1e-5, rtol=0)


def assert_round_trip(model: Decoder, empty: Decoder, weight_map: WeightMap, folder: Path) -> None:
    """Through a sharded checkpoint, without a bit changed."""
    written(model, weight_map, folder, max_shard_bytes=200_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    checkpoint.load(empty, weight_map, folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, empty.state_dict()[name]), name


def totals(model: Decoder, experts_per_token: int, experts: int) -> tuple[float, float]:
    """(all, active for one token) parameters in billions."""
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return total / 1e9, (total - routed + routed * experts_per_token / experts) / 1e9
