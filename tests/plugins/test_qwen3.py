"""The qwen3 family against transformers: logits, gradients, files in both directions, and generation against itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from prl.blocks import checkpoint
from prl.blocks.context import Context
from prl.blocks.decoder import Decoder
from prl.blocks.linear import linear
from prl.compose.config import ModelConfig
from prl.errors import CheckpointError, UserError
from prl.rollout.tokenizer import CharacterTokenizer
from prl_qwen3 import Qwen3Config, prl_models
from prl_qwen3.chat import renderer
from prl_qwen3.network import build
from prl_qwen3.sizes import resolve
from prl_qwen3.weights import weight_map
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM

VOCAB = 96
DENSE = Qwen3Config(layers=3)
SIZES = {
    "dense": DENSE,
    "wide heads, tied": Qwen3Config(
        hidden_size=96, layers=2, heads=6, kv_heads=2, head_dim=24, tied_embeddings=True, rope_theta=1e6
    ),
    "one kv head": Qwen3Config(hidden_size=64, intermediate_size=176, layers=2, heads=4, kv_heads=1, head_dim=16),
    "experts": Qwen3Config(layers=2, experts=8, experts_per_token=3, expert_intermediate_size=48),
    "experts, weights as they are": Qwen3Config(
        layers=2, kv_heads=4, experts=4, experts_per_token=2, norm_topk_prob=False, tied_embeddings=True
    ),
}
every_size = pytest.mark.parametrize("config", SIZES.values(), ids=SIZES.keys())


def made(config: Qwen3Config, seed: int = 0) -> Decoder:
    """Weights large enough for uneven distributions; norms that are not one."""
    model = build(config, VOCAB)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.rand(parameter.shape, generator=draw) + 0.5
                if parameter.dim() == 1
                else torch.randn(parameter.shape, generator=draw) * 0.06
            )
    return model


def written(model: Decoder, config: Qwen3Config, folder: Path, **options: Any) -> Path:
    checkpoint.save(model.state_dict().items(), weight_map(config, VOCAB), folder, **options)
    return folder


def oracle(folder: Path, attention: str = "eager") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)


def packed(*lengths: int) -> Context:
    return Context.packed(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]))


def logits(model: Decoder, tokens: Tensor, context: Context) -> Tensor:
    return linear(model.hidden(tokens, context), model.head())


def some_tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


# --- against transformers ---------------------------------------------------------------------------------------------
@every_size
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_and_gradients_are_those_of_transformers(config: Qwen3Config, seed: int, tmp_path: Path) -> None:
    model = made(config, seed)
    reference = oracle(written(model, config, tmp_path))
    assert type(reference) is (Qwen3MoeForCausalLM if config.experts else Qwen3ForCausalLM)
    tokens, targets = some_tokens(70, seed), some_tokens(70, seed + 10)
    own, theirs = logits(model, tokens, packed(70)), reference(input_ids=tokens[None], use_cache=False).logits[0]
    torch.testing.assert_close(own, theirs, atol=5e-6, rtol=0)
    for output in (own, theirs):
        torch.nn.functional.cross_entropy(output, targets).backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        for hf_name, view in weight_map(config, VOCAB).to_hf(name, gradient):
            torch.testing.assert_close(view, _gradient(expected, hf_name), atol=2e-6, rtol=0)


def _gradient(parameters: dict[str, Any], name: str) -> Tensor:
    """transformers 5 stacks experts in memory: [E, 2 F, D] and [E, D, F]."""
    if ".experts." not in name:
        gradient: Tensor = parameters[name].grad
        return gradient
    stem, _, rest = name.partition(".experts.")
    expert, projection, _ = rest.split(".")
    if projection == "down_proj":
        return parameters[f"{stem}.experts.down_proj"].grad[int(expert)]  # type: ignore[no-any-return]
    gate, up = parameters[f"{stem}.experts.gate_up_proj"].grad[int(expert)].chunk(2)
    return gate if projection == "gate_proj" else up  # type: ignore[no-any-return]


@every_size
def test_a_checkpoint_written_by_transformers_is_read(config: Qwen3Config, tmp_path: Path) -> None:
    reference = oracle(written(made(config), config, tmp_path / "ours"))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.01)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    from_folder = Qwen3Config(checkpoint=str(tmp_path / "theirs"))
    model = build(from_folder, VOCAB)
    checkpoint.load(model, weight_map(from_folder, VOCAB), tmp_path / "theirs")
    tokens = some_tokens(50)
    with torch.no_grad():
        own, theirs = logits(model, tokens, packed(50)), reference(input_ids=tokens[None]).logits[0]
    torch.testing.assert_close(own, theirs, atol=5e-6, rtol=0)


@every_size
def test_writing_and_reading_changes_no_bit(config: Qwen3Config, tmp_path: Path) -> None:
    model = made(config)
    written(model, config, tmp_path, max_shard_bytes=200_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = build(config, VOCAB)
    checkpoint.load(loaded, weight_map(config, VOCAB), tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


@every_size
def test_sizes_survive_the_config_json(config: Qwen3Config, tmp_path: Path) -> None:
    written(made(config), config, tmp_path)
    again = resolve(Qwen3Config(checkpoint=str(tmp_path)), VOCAB)
    assert weight_map(again, VOCAB).hf_config() == weight_map(config, VOCAB).hf_config()
    assert again.vocab_size == VOCAB


def test_a_long_context_in_one_document(tmp_path: Path) -> None:
    """Rotary angles are float32: far positions are where an error would show."""
    model = made(DENSE)
    reference = oracle(written(model, DENSE, tmp_path), attention="sdpa")
    tokens = some_tokens(700)
    with torch.no_grad():
        own, theirs = logits(model, tokens, packed(700)), reference(input_ids=tokens[None]).logits[0]
    torch.testing.assert_close(own, theirs, atol=5e-6, rtol=0)


# --- against itself ---------------------------------------------------------------------------------------------------
@every_size
@pytest.mark.parametrize("lengths", [(13, 13, 13), (40, 1, 7, 22), (5, 60)])
def test_packed_documents_are_as_if_alone(config: Qwen3Config, lengths: tuple[int, ...]) -> None:
    model, tokens = made(config), some_tokens(sum(lengths))
    with torch.no_grad():
        together = logits(model, tokens, packed(*lengths))
        alone = torch.cat([logits(model, part, packed(len(part))) for part in tokens.split(lengths)])
    torch.testing.assert_close(together, alone, atol=5e-6, rtol=0)


@every_size
@torch.inference_mode()
def test_generation_step_by_step_equals_the_whole(config: Qwen3Config) -> None:
    """Ragged prompts in chunks, decoding, a copied prefix, a later turn: all as one forward pass over everything."""
    model = made(config)
    texts = [some_tokens(30, seed=seed) for seed in range(3)]
    expected = [logits(model, text, packed(30)) for text in texts]
    caches = model.new_caches(rows=5, length=32)
    past = [0, 0, 0]
    for lengths in [(6, 9, 2), (3, 1, 8), (1, 1, 1), (1, 1, 1), (4, 0, 5), (1, 1, 1)]:
        context = Context.cached(caches, lengths=lengths, rows=slice(1, 4), past=past)
        tokens = torch.cat([t[p : p + n] for t, p, n in zip(texts, past, lengths, strict=True)])
        wanted = torch.cat([e[p : p + n] for e, p, n in zip(expected, past, lengths, strict=True)])
        torch.testing.assert_close(logits(model, tokens, context), wanted, atol=1e-5, rtol=0)
        past = [p + n for p, n in zip(past, lengths, strict=True)]
    for cache in caches:
        cache.copy_row(1, 4, 7)
    rest = Context.cached(caches, lengths=(23,), rows=torch.tensor([4]), past=(7,))
    torch.testing.assert_close(logits(model, texts[0][7:], rest), expected[0][7:], atol=1e-5, rtol=0)


def test_equal_seeds_build_equal_models() -> None:
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(build(DENSE, VOCAB).state_dict())
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    assert not torch.equal(models[0]["lm_head.weight"], models[2]["lm_head.weight"])


def test_the_benchmark_model_has_312_064_parameters() -> None:
    config = Qwen3Config(layers=2, vocab_size=64)
    assert sum(p.numel() for p in build(config, 20).parameters()) == 312_064


# --- config -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_heads": 3}, r"'kv_heads' must divide heads \(4\): 3"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"experts": 2, "experts_per_token": 3}, r"experts_per_token must be <= experts \(2\): 3"),
        ({"checkpoint": "x", "layers": 2, "heads": 8}, "leave out layers, heads"),
        ({"hidden_size": 0}, "'hidden_size' must be > 0: 0"),
    ],
)
def test_impossible_sizes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Qwen3Config(**fields)


def test_a_vocabulary_smaller_than_the_tokenizer() -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size is 10, but the tokenizer has 96 tokens"):
        build(Qwen3Config(vocab_size=10), VOCAB)


def test_a_larger_vocabulary_than_the_tokenizer() -> None:
    assert build(Qwen3Config(vocab_size=128, layers=1), VOCAB).head().shape == (128, 128)


def config_json(folder: Path, **changes: Any) -> Qwen3Config:
    stored = {**weight_map(DENSE, VOCAB).hf_config(), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in stored.items() if v is not ...}))
    return Qwen3Config(checkpoint=str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama' is not supported, only 'qwen3'"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "type 'yarn'"),
        ({"rope_parameters": ..., "rope_theta": ...}, "theta None"),
        ({"head_dim": ...}, "lacks head_dim"),
        ({"vocab_size": 12}, "vocab_size is 12, but the tokenizer has 96"),
    ],
)
def test_a_config_json_that_cannot_be_used(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve(config_json(tmp_path, **changes), VOCAB)
    assert str(tmp_path) in str(caught.value)


def test_config_json_of_earlier_transformers(tmp_path: Path) -> None:
    config = config_json(tmp_path, rope_parameters=..., rope_scaling=None, rope_theta=5e5)
    assert resolve(config, VOCAB).rope_theta == 5e5


def test_no_config_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        resolve(Qwen3Config(checkpoint=str(tmp_path)), VOCAB)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    written(made(DENSE), DENSE, tmp_path)
    other = Qwen3Config(layers=4, intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.3.*gate_proj\.weight is \[256, 128\]"):
        checkpoint.load(build(other, VOCAB), weight_map(other, VOCAB), tmp_path)


def test_a_tied_checkpoint_may_repeat_its_embedding(tmp_path: Path) -> None:
    """As published Qwen3 checkpoints do."""
    tied = SIZES["wide heads, tied"]
    untied = Qwen3Config(**{**{f: getattr(tied, f) for f in ("hidden_size", "layers", "heads", "head_dim")},
                            "rope_theta": tied.rope_theta})  # fmt: skip
    model = made(untied)
    with torch.no_grad():
        model.head().copy_(model.embed_tokens.weight)
    written(model, untied, tmp_path)
    loaded = build(tied, VOCAB)
    checkpoint.load(loaded, weight_map(tied, VOCAB), tmp_path)
    assert torch.equal(loaded.head(), model.head())


# --- the plugin -------------------------------------------------------------------------------------------------------
def test_the_provider() -> None:
    (provider,) = prl_models()
    assert provider.name == "qwen3"
    assert issubclass(provider.config, ModelConfig)
    assert provider.special_tokens == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    tokenizer = CharacterTokenizer("asitn\n", provider.special_tokens)
    rendered = renderer(DENSE, tokenizer).start([])
    assert tokenizer.decode(rendered) == "<|im_start|>assistant\n"
