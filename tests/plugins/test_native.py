"""The number formats fp32 and bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from prl.compose.compose import compose
from prl.errors import ConfigError
from prl_native import Bf16Config, Fp32Config, prl_quantizations
from prl_native.formats import bf16, fp32

CONFIG = Path(__file__).parents[2] / "configs" / "spell_backward.toml"


def test_fp32_sends_what_it_is_given():
    number_format, tensor = fp32(Fp32Config()), torch.randn(4)
    ((name, sent),) = number_format.export("a.weight", tensor)
    assert (name, sent.data_ptr()) == ("a.weight", tensor.data_ptr())
    assert (number_format.train_dtype, number_format.serve_dtype) == (torch.float32, torch.float32)


def test_bf16_rounds_on_the_way_out_and_trains_in_float32():
    number_format, tensor = bf16(Bf16Config()), torch.tensor([1.0, 1.001, -3.14159])
    ((_, sent),) = number_format.export("a.weight", tensor)
    assert sent.dtype == number_format.serve_dtype == torch.bfloat16
    assert sent.tolist() == [1.0, 1.0, -3.140625]
    assert number_format.train_dtype == torch.float32


def test_bf16_can_hold_the_trainers_parameters_in_bfloat16():
    number_format = bf16(Bf16Config(parameters="bfloat16"))
    assert (number_format.train_dtype, number_format.serve_dtype) == (torch.bfloat16, torch.bfloat16)


def test_parameters_in_bfloat16_want_an_optimizer_with_float32_copies():
    edits = ["quantization.type=bf16", "quantization.parameters=bfloat16"]
    assert compose(CONFIG, overrides=edits, probe=False).run.optimizer.keeps_float32
    with pytest.raises(ConfigError) as refused:
        compose(CONFIG, plugins="sign_sgd", overrides=[*edits, "optimizer.type=sign_sgd"], probe=False)
    (problem,) = refused.value.problems
    assert "SignSgdConfig keeps no float32 copies" in problem.message


def test_integers_travel_as_they_are():
    ((_, sent),) = bf16(Bf16Config()).export("table", torch.tensor([257, 70000]))
    assert sent.tolist() == [257, 70000]


@pytest.mark.parametrize("provider", list(prl_quantizations()), ids=lambda p: p.name)
def test_the_declared_tolerance_covers_what_rounding_does_to_logprobs(provider):
    number_format = {"fp32": fp32, "bf16": bf16}[provider.name](provider.config())
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(200, 64, generator=draw), torch.randn(50, 64, generator=draw) / 8
    ((_, served),) = number_format.export("head", head)
    trainer, engine = ((hidden @ w.float().T).log_softmax(-1) for w in (head, served))
    assert (trainer - engine).abs().mean() <= number_format.tolerance
