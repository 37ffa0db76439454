"""Planned bytes against those of tensors that exist: one rank, and two under the elastic agent."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import attrs
import pytest
import torch
from prl.plan.memory import Formats, Settings, held, memory, shard_size
from prl.train.agent import launch
from prl.train.layout import Layout
from prl.train.parallel.ranks import Ranks
from prl.train.survey import ParameterInfo, Survey, optimizer_bytes, optimizer_working, survey
from prl_adamw import AdamWConfig
from prl_adamw.adamw import build as adamw
from prl_sign_sgd import SignSgdConfig
from prl_sign_sgd.sign_sgd import build as sign_sgd

from tests.plan.held import CHUNK, LENGTHS, MODELS, build
from tests.plan.held import held as really_held

REPOSITORY = Path(__file__).parents[2]


@functools.cache
def surveyed(name: str) -> Survey:
    return survey(functools.partial(build, name), device="cpu", dtype=torch.float32)


def adamw_of(named: Iterable[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
    return adamw(AdamWConfig(), named, 1e-3)


def settings(shard: int = 1) -> Settings:
    per_byte, per_parameter = optimizer_bytes(adamw_of)
    return Settings(
        layout=Layout(shard=shard),
        formats=Formats(
            parameter=4,
            compute=4,
            optimizer=per_byte,
            optimizer_per_parameter=per_parameter,
            optimizer_working=optimizer_working(adamw_of),
            serve=4,
        ),
        checkpointing="none",
        optimizer_offload=False,
        logprob_chunk=CHUNK,
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, int]]]:
    """What each of two ranks holds."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        assert launch([sys.executable, "-m", "tests.plan.held", str(folder), "2"], ranks=2) == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_holds_what_was_planned(name: str) -> None:
    real = really_held(Ranks(rank=0, device=torch.device("cpu")), name)
    plan = memory(surveyed(name), settings(), LENGTHS, sampled=1.0, granularity=1)
    assert (plan.parameters, plan.gradients, plan.optimizer) == (
        real["parameters"],
        real["gradients"],
        real["optimizer"],
    )
    assert plan.kept + plan.scored == pytest.approx(real["kept"], rel=0.02)


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        ("qwen3", ("mlp",)),
        ("glm-5.1", ("experts",)),
        ("kimi-k2.7", ("experts", "mlp")),
        ("nemotron-3-ultra", ("mamba", "experts")),
    ],
)
def test_selective_checkpointing_keeps_what_was_planned(name: str, recompute: tuple[str, ...]) -> None:
    # Not attention: what its layers share lives on in the context, unseen by hooks where it is made to be made again.
    real = really_held(Ranks(rank=0, device=torch.device("cpu")), name, frozenset(recompute))
    selective = attrs.evolve(settings(), checkpointing="selective", recompute=recompute)
    plan = memory(surveyed(name), selective, LENGTHS, sampled=1.0, granularity=1)
    assert plan.kept + plan.scored == pytest.approx(real["kept"], rel=0.02)
    assert plan.kept < 0.9 * memory(surveyed(name), settings(), LENGTHS, sampled=1.0, granularity=1).kept


@pytest.mark.parametrize("name", MODELS)
def test_each_of_two_ranks_holds_what_was_planned(name: str, ranks: list[dict[str, dict[str, int]]]) -> None:
    for rank, found in enumerate(ranks):
        parameters, gradients, optimizer = held(surveyed(name).parameters, settings(2), rank)
        real = found[name]
        assert (parameters, gradients, optimizer) == (real["parameters"], real["gradients"], real["optimizer"])
        plan = memory(surveyed(name), settings(2), LENGTHS, sampled=1.0, granularity=1)
        assert plan.kept + plan.scored == pytest.approx(real["kept"], rel=0.02)


def parameter(*shape: int, expert: bool = False) -> ParameterInfo:
    return ParameterInfo(name="w", shape=shape, trained=True, layer=0, expert=expert, float32=False)


def test_rows_are_divided_as_torch_chunks_them() -> None:
    sizes = [shard_size(parameter(5, 3), Layout(shard=4), rank) for rank in range(4)]
    assert sizes == [len(c) * 3 for c in torch.empty(5).chunk(4)] + [0]


def test_experts_are_divided_over_expert_ranks_first_then_over_the_rest() -> None:
    eight = parameter(8, 6, 4, expert=True)
    assert shard_size(eight, Layout(shard=4, expert=4)) == 2 * 6 * 4
    assert shard_size(eight, Layout(shard=8, expert=4)) == 1 * 6 * 4
    assert shard_size(eight, Layout(shard=16, expert=8)) == 1 * 3 * 4  # one expert, its rows over two ranks


def test_checkpointing_keeps_a_row_a_layer_and_offload_moves_the_state_to_the_host() -> None:
    model = surveyed("qwen3")
    plain = memory(model, settings(), LENGTHS, sampled=1.0)
    lean = memory(model, attrs.evolve(settings(), checkpointing="full", optimizer_offload=True), LENGTHS, sampled=1.0)
    layers = sum(len(kind.layers) for kind in model.kinds)
    row = sum(LENGTHS) * model.hidden_size * 4
    assert lean.kept < plain.kept
    assert layers * row <= lean.kept < (layers + 4) * row
    assert (lean.optimizer, lean.host) == (0, plain.optimizer)
    assert lean.phases["optimizer"] == plain.phases["optimizer"]  # it comes for the step
    assert lean.peak < plain.peak


def test_inputs_of_layers_wait_in_host_memory_but_for_two() -> None:
    model = surveyed("qwen3")
    here = memory(model, attrs.evolve(settings(), checkpointing="full"), LENGTHS, sampled=1.0)
    away = memory(model, attrs.evolve(settings(), checkpointing="full", activation_offload=True), LENGTHS, sampled=1.0)
    layers = sum(len(kind.layers) for kind in model.kinds)
    row = sum(LENGTHS) * model.hidden_size * 4
    assert (here.host_activations, away.host_activations) == (0, layers * row)
    assert here.kept - away.kept == (layers - 2) * row


def test_inputs_of_parts_wait_in_host_memory_but_for_two() -> None:
    model = surveyed("nemotron-3-ultra")
    selective = attrs.evolve(settings(), checkpointing="selective", recompute=("mamba", "attention"))
    here = memory(model, selective, LENGTHS, sampled=1.0)
    away = memory(model, attrs.evolve(selective, activation_offload=True), LENGTHS, sampled=1.0)
    inputs = sum(len(kind.layers) for kind in model.kinds if {*kind.mixers} & {"mamba", "attention"})
    row = sum(LENGTHS) * model.hidden_size * 4
    assert (here.host_activations, away.host_activations) == (0, inputs * row)
    assert here.kept - away.kept == (inputs - 2) * row


@pytest.mark.parametrize(
    ("build", "dtype", "expected"),
    [
        (adamw_of, torch.float32, 0.0),
        (adamw_of, torch.bfloat16, 2.0),  # all gradients in float32
        (lambda named: sign_sgd(SignSgdConfig(), named, 1e-3), torch.bfloat16, 0.0),  # one sign after the other
    ],
)
def test_what_a_step_makes_of_all_gradients_at_once(build, dtype: torch.dtype, expected: float) -> None:
    assert optimizer_working(build, dtype) == expected
