"""A two-layer model that decides something, and a scheduler around it: what the tests of the embedded engine share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from prl.blocks.attention import GroupedQueryAttention
from prl.blocks.context import Context
from prl.blocks.decoder import Decoder, Layer, Sublayer
from prl.blocks.mamba2 import Mamba2, MambaSizes
from prl.blocks.mlp import GatedMLP
from prl.blocks.norm import RMSNorm
from prl.blocks.rope import RotaryEmbedding
from prl.serve.requests import Request, Result
from prl.types import Completion, Sampling, as_tokens
from prl_torch_engine.scheduler import Scheduler

VOCAB = 40
STOP = 1


def tiny_model(seed: int = 0) -> Decoder:
    """Weights are large enough for uneven distributions that depend on the whole context."""
    rope = RotaryEmbedding(head_dim=8, theta=10_000.0)
    layers = [
        Layer(
            Sublayer("input_norm", RMSNorm(32, 1e-6), "attention", _attention(rope)),
            Sublayer("mlp_norm", RMSNorm(32, 1e-6), "mlp", GatedMLP(32, 48)),
        )
        for _ in range(2)
    ]
    model = Decoder(vocab_size=VOCAB, hidden_size=32, layers=layers, norm_eps=1e-6, tied_embeddings=False)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.35, generator=draw)
    return model.eval().requires_grad_(False)


def _attention(rope: RotaryEmbedding) -> GroupedQueryAttention:
    return GroupedQueryAttention(hidden_size=32, heads=4, kv_heads=2, head_dim=8, rope=rope, qk_norm_eps=1e-6)


def scheduler(
    model: Decoder | None = None,
    *,
    sequences: int = 8,
    retained: int = 8,
    length: int = 64,
    prefill_tokens: int = 256,
) -> Scheduler:
    """Serving version 0."""
    made = Scheduler(
        model or tiny_model(),
        sequences=sequences,
        retained=retained,
        length=length,
        prefill_tokens=prefill_tokens,
    )
    made.set_version(0)
    return made


def request(
    name: str, prompt: Sequence[int], *, n: int = 1, stop: tuple[int, ...] = (), session: str = "", **sampling: float
) -> Request:
    return Request(
        request_id=name,
        prompt=as_tokens(list(prompt)),
        sampling=Sampling(**{"max_tokens": 12, **sampling}),  # type: ignore[arg-type]
        n=n,
        stop=stop,
        session=session,
    )


@torch.inference_mode()
def finish(engine: Scheduler, *requests: Request) -> dict[str, Result]:
    """Run until nothing is left to do; results by request."""
    for entry in requests:
        engine.add(entry)
    while engine.busy:
        engine.step()
    return {result.request_id: result for result in engine.take()[0]}


@torch.no_grad()
def reference_logprobs(
    model: Decoder, prompt: Sequence[int], completion: Completion, temperature: float = 1.0
) -> np.ndarray:
    """[sampled, VOCAB] what a forward pass over the whole sequence gives each sampled token to choose from."""
    tokens = torch.tensor([*prompt, *completion.tokens.tolist()])
    hidden = model.hidden(tokens, Context.packed(torch.tensor([0, len(tokens)])))
    logits = (hidden @ model.head().T)[len(list(prompt)) - 1 : -1]
    rows: np.ndarray = (logits / temperature).log_softmax(1).numpy()
    return rows


def chosen(rows: np.ndarray, completion: Completion) -> np.ndarray:
    """[sampled] the entries of the sampled tokens."""
    values: np.ndarray = rows[np.arange(len(completion.tokens)), completion.tokens]
    return values


def recurrent_model(seed: int = 0) -> Decoder:
    """A recurrent layer between two of the layers of `tiny_model`: a row's cache cannot be cut back to a prefix."""
    model = tiny_model(seed)
    sizes = MambaSizes(heads=4, head_dim=8, groups=2, state=8, kernel=4, chunk=16)
    mamba = Mamba2(sizes, hidden_size=32, norm_eps=1e-6)
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in mamba.parameters():
            parameter.normal_(0.0, 0.35, generator=draw)
    model.layers.insert(1, Layer(Sublayer("norm", RMSNorm(32, 1e-6), "mixer", mamba)))
    return model.eval().requires_grad_(False)
