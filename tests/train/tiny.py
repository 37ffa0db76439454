"""A language model small enough to check by hand, and random samples of all streams.

Tests import it, and so does `rank_program.py`: the same model and batches, in one process and on several ranks.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from prl import checkpoint_dir
from prl.blocks.context import Context
from prl.blocks.sharded import full
from prl.blocks.weight_map import ListedWeightMap
from prl.checkpoint_dir import CheckpointManifest, FileRecord
from prl.score.pack import pack
from prl.train.step import Stepper
from prl.train.streams import StreamLoss
from prl.types import Batch, Sample
from prl_policy_gradient import CrossEntropyConfig, DppoConfig, RefKLConfig
from prl_policy_gradient.losses import cross_entropy, dppo, ref_kl
from prl_qwen3 import Qwen3Config
from prl_qwen3.network import build as qwen3
from prl_qwen3.weights import weight_map
from torch import Tensor, nn

VOCAB, WIDTH = 23, 12
torch.set_num_threads(1)


class CausalMean(nn.Module):
    """Each token sees the mean of its sample so far."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T, WIDTH] -> [T, WIDTH]"""
        sums = torch.cat([sample.cumsum(0) for sample in x.split(context.lengths)])
        return x + torch.tanh(self.linear(sums / (context.positions + 1).unsqueeze(1)))


class TinyModel(nn.Module):
    """A `prl.providers.LanguageModel` of two layers, with a buffer."""

    scale: Tensor

    def __init__(self, vocab_size: int = VOCAB) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, WIDTH)
        self.layers = nn.ModuleList(CausalMean() for _ in range(2))
        self.output = nn.Linear(WIDTH, vocab_size, bias=False)
        self.register_buffer("scale", torch.tensor(1.5))

    def hidden(self, tokens: Tensor, context: Context) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, context)
        return x * self.scale

    def head(self) -> Tensor:
        return self.output.weight


class SameNames:
    """A weight map and a number format that change nothing."""

    carried = ()

    def to_hf(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield name, tensor

    export = to_hf

    def from_hf(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        return tensors[name]

    def hf_config(self) -> dict[str, str]:
        return {"model_type": "tiny"}


class GradientRecorder(torch.optim.Optimizer):
    """Moves nothing; remembers the whole gradients of the last step."""

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.named = dict(named_parameters)
        self.gradients: dict[str, Tensor] = {}
        super().__init__(self.named.values(), {"lr": 0.0})

    def step(self) -> None:
        self.gradients = {name: full(p.grad).clone() for name, p in self.named.items()}


def build_model(seed: int = 0) -> TinyModel:
    torch.manual_seed(seed)
    return TinyModel()


def build_qwen3(seed: int = 0, *, experts: int = 0) -> nn.Module:
    """A real model family at the same vocabulary, dense or with experts."""
    torch.manual_seed(seed)
    return qwen3(qwen3_config(experts), VOCAB)


def qwen3_config(experts: int) -> Qwen3Config:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8}
    return Qwen3Config(**sizes, experts=experts, expert_intermediate_size=12)


def qwen3_map(experts: int = 4) -> ListedWeightMap:
    return weight_map(qwen3_config(experts), VOCAB)


MODELS = {"tiny": build_model, "qwen3": build_qwen3, "qwen3_moe": functools.partial(build_qwen3, experts=4)}


def build_losses() -> dict[str, StreamLoss]:
    return {
        "rl": StreamLoss(function=dppo(DppoConfig())),
        "ce": StreamLoss(function=cross_entropy(CrossEntropyConfig())),
        "ref_kl": StreamLoss(function=ref_kl(RefKLConfig()), needs=frozenset({"ref_logprobs"})),
    }


def build_stepper(model: nn.Module, optimizer: torch.optim.Optimizer, **changes: object) -> Stepper:
    settings = {
        "losses": build_losses(),
        "logprob_chunk": 7,
        "max_grad_norm": 1e9,
        "device": torch.device("cpu"),
        **changes,
    }
    return Stepper(model=model, optimizer=optimizer, **settings)


def random_samples(count: int = 6, *, seed: int = 0, version: int = 5, longest: int = 11) -> list[Sample]:
    """Samples of 3 to `longest` tokens: half of each is sampled, in one stream or two, not all weights are 1."""
    draw = np.random.default_rng(seed)
    return [_random_sample(draw, index, version, longest) for index in range(count)]


def _random_sample(draw: np.random.Generator, index: int, version: int, longest: int) -> Sample:
    length = int(draw.integers(3, longest + 1))
    sampled = np.arange(length) >= (length + 1) // 2
    stream = ("rl", "ce", "ref_kl")[index % 3]
    weights = {stream: (sampled * draw.choice([0.0, 0.5, 1.0, 2.0], length)).astype(np.float32)}
    if stream == "rl":
        weights["ce"] = (~sampled * (np.arange(length) > 0) * 0.1).astype(np.float32)
    return Sample(
        tokens=draw.integers(0, VOCAB, length).astype(np.int32),
        sampled=sampled,
        engine_logprobs=np.where(sampled, -np.log(VOCAB) + 0.3 * draw.standard_normal(length), 0).astype(np.float32),
        versions=np.where(sampled, version - draw.integers(0, 2), -1).astype(np.int32),
        advantages=np.where(sampled, draw.standard_normal(), 0).astype(np.float32),
        temperature=float(draw.choice([0.7, 1.0, 1.3])),
        weights=weights,
        ref_logprobs=np.where(sampled, -3.0, 0).astype(np.float32),
    )


def siblings(seed: int = 0, *, count: int = 4, prompt: int = 6) -> list[Sample]:
    """Samples of one prompt, of which the answers have 1 to 5 tokens, all in the rl stream."""
    draw = np.random.default_rng(seed)
    prompt_tokens = draw.integers(0, VOCAB, prompt)
    samples = []
    for _ in range(count):
        length = prompt + int(draw.integers(1, 6))
        sampled = np.arange(length) >= prompt
        samples.append(
            Sample(
                tokens=np.append(prompt_tokens, draw.integers(0, VOCAB, length - prompt)).astype(np.int32),
                sampled=sampled,
                engine_logprobs=np.where(sampled, -np.log(VOCAB), 0).astype(np.float32),
                versions=np.where(sampled, 5, -1).astype(np.int32),
                advantages=np.where(sampled, draw.standard_normal(), 0).astype(np.float32),
                temperature=1.0,
                weights={"rl": sampled.astype(np.float32)},
            )
        )
    return samples


def pack_batch(
    samples: Sequence[Sample],
    *,
    ranks: int = 1,
    context: int = 1,
    micro_batch_tokens: int = 1000,
    step: int = 6,
    version: int = 5,
) -> Batch:
    capacity = micro_batch_tokens
    return pack(
        samples, step=step, version=version, phase="rl", ranks=ranks, context=context, micro_batch_tokens=capacity
    )


def commit_checkpoint(path: Path, *, step: int) -> None:
    """What the controller does once every rank has written its part beside `path`."""
    folder = checkpoint_dir.partial(path)
    files = {
        str(file.relative_to(folder)): FileRecord(nbytes=file.stat().st_size, checksum=zlib.crc32(file.read_bytes()))
        for file in folder.rglob("*")
        if file.is_file()
    }
    checkpoint_dir.commit(path, CheckpointManifest(format=checkpoint_dir.FORMAT, step=step, identity={}, files=files))


def gradients_of(batch: Batch, *, model_name: str = "tiny", **changes: object) -> dict[str, Tensor]:
    """The gradient of a batch packed for one rank, by parameter."""
    model = MODELS[model_name]()
    recorder = GradientRecorder(model.named_parameters())
    build_stepper(model, recorder, **changes).step(batch, batch.ranks[0], 0.0)
    return recorder.gradients


def relative_difference(seen: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest norm of a difference over the norm expected, over tensors of the same names."""
    assert seen.keys() == expected.keys()
    return max(((seen[k] - expected[k]).norm() / expected[k].norm().clamp(min=1e-12)).item() for k in expected)
