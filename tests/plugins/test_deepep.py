"""The plugin's dispatch is the all-to-all's, and where DeepEP cannot run a sentence says why."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from prl.blocks.kernels import SEAMS
from prl.blocks.moe import HERE, Experts
from prl.compose.compose import compose
from prl.errors import ConfigError, RunError, UserError
from prl.train.agent import launch
from prl_deepep import DeepEpConfig, exchange
from prl_deepep.kernel import build, dispatch

REPOSITORY = Path(__file__).parents[2]
SPELL = REPOSITORY / "configs" / "spell_backward.toml"
OLD = ""
NEW = "class ElasticBuffer: ...\ndef find_cuda_home(): return {toolkit!r}"


def test_two_ranks_compute_what_they_do_by_all_to_all(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert launch([sys.executable, "-m", "tests.plugins.deepep_program", str(tmp_path)], ranks=2) == 0
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["buffers"] == [{"room": 9, "given_back": True}]  # on both ranks for the tokens of rank 1
        for differences in found["differences"].values():
            assert len(differences) == 5  # outputs; gradients of tokens, router and two matrices of the experts
            assert max(differences) < 1e-6


def test_experts_that_are_all_here_are_the_reference_s():
    torch.manual_seed(0)
    experts = Experts(experts=4, hidden_size=8, intermediate_size=8)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x, weights, chosen = torch.randn(5, 8), torch.rand(5, 2), torch.rand(5, 4).argsort(-1)[:, :2]
    expected = SEAMS["dispatch"].reference(x, weights, chosen, experts, HERE, 4)
    assert torch.equal(dispatch(x, weights, chosen, experts, HERE, 4), expected)


def test_what_is_not_installed_is_refused_before_the_run_starts():
    overrides = ["kernels.dispatch.type=deepep"]
    with pytest.raises(
        ConfigError, match=r"kernel 'deepep' is unavailable here: needs deep_ep; install deep_ep as its"
    ):
        compose(SPELL, plugins="deepep", overrides=overrides)


def test_a_process_without_it_says_what_is_missing_and_what_to_do():
    with pytest.raises(UserError, match=r"'deepep' is unavailable: the module deep_ep cannot be .* by all-to-all$"):
        build(DeepEpConfig())


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A module of that name with this content, and a CUDA toolkit with these tools."""

    def install(content: str, *tools: str) -> None:
        for tool in tools:
            (tmp_path / "bin").mkdir(exist_ok=True)
            (tmp_path / "bin" / tool).touch()
        (tmp_path / "deep_ep.py").write_text(content.format(toolkit=str(tmp_path)))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "deep_ep", raising=False)

    yield install
    sys.modules.pop("deep_ep", None)


def on_a_device(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_an_older_deep_ep_is_not_enough(installed):
    installed(OLD)
    assert exchange.missing() == "the installed deep_ep has no ElasticBuffer: it needs version 2 or newer"


def test_what_deep_ep_says_of_its_surroundings_is_handed_on(installed):
    installed("assert False, 'Invalid NCCL versions:\\n  2.28.9'")
    assert exchange.missing() == "the module deep_ep cannot be imported: Invalid NCCL versions: 2.28.9"


def test_it_needs_what_compiles_its_kernels(installed, tmp_path):
    installed(NEW, "nvcc")
    assert exchange.missing() == f"DeepEP compiles kernels with the CUDA toolkit, and {tmp_path} has no cuobjdump"


def test_it_needs_a_device_of_the_hopper_generation(installed, monkeypatch):
    installed(NEW, "nvcc", "cuobjdump")
    assert exchange.missing() == ("" if torch.cuda.is_available() else "there is no CUDA device")
    on_a_device(monkeypatch, (8, 0))
    assert exchange.missing() == "A GPU is of compute capability 8.0, and 9.0 (Hopper) is needed"
    on_a_device(monkeypatch, (9, 0))
    assert exchange.missing() == ""
    assert build(DeepEpConfig()) is dispatch


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.zeros(2, 256), r"'deepep' sends bfloat16, and the layer computes in torch\.float32"),
        (torch.zeros(2, 300, dtype=torch.bfloat16), r"of a multiple of 256 numbers, and the layer's have 300; leave"),
    ],
)
def test_tokens_that_it_cannot_send_are_refused(x, sentence):
    with pytest.raises(RunError, match=sentence):
        exchange.check(x)
