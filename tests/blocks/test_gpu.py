"""The paths only a GPU takes: variable-length flash attention, fused kernels, grouped products in bfloat16."""

from __future__ import annotations

import pytest
import torch
from prl.blocks import attend as attend_module
from prl.blocks.attend import attend
from prl.blocks.context import Context
from prl.blocks.decoder import Decoder
from prl.blocks.linear import linear
from prl_qwen3 import Qwen3Config
from prl_qwen3.network import build
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (300, 7, 513, 64)
MODELS = {"dense": Qwen3Config(), "experts": Qwen3Config(experts=8, experts_per_token=3)}


def packed(device: str) -> Context:
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    with torch.device(device):
        return Context.packed(bounds)


def model(config: Qwen3Config) -> tuple[Decoder, Tensor]:
    torch.manual_seed(0)
    return build(config, 96), torch.randint(96, (sum(LENGTHS),))


def logits(decoder: Decoder, tokens: Tensor, context: Context) -> Tensor:
    return linear(decoder.hidden(tokens, context), decoder.head())


def test_flash_attention_equals_the_padded_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs = [
        torch.randn(sum(LENGTHS), heads, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, 2, 2)
    ]
    assert attend_module._flash_takes(inputs[0])
    results = []
    for flash in (True, False):
        monkeypatch.setattr(attend_module, "_flash_takes", lambda q, flash=flash: flash)
        out = attend(*inputs, packed("cuda"), scale=0.1)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    for flash, padded in zip(*results, strict=True):
        assert (flash - padded).abs().max() <= 0.02 * padded.abs().max()


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_float32_logits_are_those_of_the_cpu(config: Qwen3Config) -> None:
    decoder, tokens = model(config)
    expected = logits(decoder, tokens, packed("cpu"))
    out = logits(decoder.cuda(), tokens.cuda(), packed("cuda"))
    torch.testing.assert_close(out.cpu(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_bfloat16_trains(config: Qwen3Config) -> None:
    decoder, tokens = model(config)
    expected = logits(decoder, tokens, packed("cpu")).log_softmax(1)
    out = logits(decoder.cuda().bfloat16(), tokens.cuda(), packed("cuda")).float().log_softmax(1)
    assert (out.cpu() - expected).abs().mean() < 0.02
    out.sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@torch.inference_mode()
def test_decoding_equals_the_whole(config: Qwen3Config) -> None:
    decoder, tokens = model(config)
    decoder, texts = decoder.cuda(), tokens[:40].cuda().view(2, 20)
    caches, past = decoder.new_caches(rows=4, length=24), [0, 0]
    with torch.device("cuda"):
        expected = [
            logits(decoder, text, Context.packed(torch.tensor([0, 20], device="cpu"))) for text in texts.unbind()
        ]
        for lengths in ((9, 4), (1, 1), (1, 1), (5, 2), (1, 1)):
            spans = [slice(p, p + n) for p, n in zip(past, lengths, strict=True)]
            context = Context.cached(caches, lengths=lengths, rows=slice(1, 3), past=past)
            out = logits(decoder, torch.cat([t[s] for t, s in zip(texts, spans, strict=True)]), context)
            wanted = torch.cat([e[s] for e, s in zip(expected, spans, strict=True)])
            torch.testing.assert_close(out, wanted, atol=2e-5, rtol=0)
            past = [p + n for p, n in zip(past, lengths, strict=True)]
