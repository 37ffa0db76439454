"""Router replay in a step: what is followed, what is counted, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from prl.blocks.context import Context
from prl.blocks.routing import RouteLog
from prl.columns import ColumnFolder
from prl.compose.routing import Routing
from prl.dispatch.metrics import trainer_metrics
from prl.messages import StepDone
from prl.routes import store
from prl.score.pack import pack
from prl.train.routes import RouteReader
from prl.types import Batch, Sample
from prl_kimi_k2 import KimiK27Config
from prl_kimi_k2.network import build as kimi
from prl_kimi_k2.sizes import routing as kimi_routing
from prl_nemotron3 import UltraConfig
from prl_nemotron3.network import build as nemotron
from prl_nemotron3.sizes import routing as nemotron_routing
from torch import Tensor, nn

from tests.train.tiny import VOCAB, GradientRecorder, build_stepper, pack_batch, random_samples, relative_difference

VERSION = 5
KIMI = KimiK27Config(hidden_size=16, layers=3, experts=300, experts_per_token=2, expert_intermediate_size=8)
ULTRA = UltraConfig(hidden_size=16, pattern="EM*E", experts=8, experts_per_token=2, expert_intermediate_size=8)
ROUTINGS = {"kimi": kimi_routing(KIMI), "nemotron": nemotron_routing(ULTRA)}
FAMILIES = ("kimi", "nemotron")


def network(family: str) -> nn.Module:
    torch.manual_seed(3)
    return kimi(KIMI, VOCAB) if family == "kimi" else nemotron(ULTRA, VOCAB)


@torch.no_grad()
def own_choice(family: str, sample: Sample) -> np.ndarray:
    """[L, M, K] what the model's routers choose for a sample by itself."""
    routing, context = ROUTINGS[family], Context.packed(torch.tensor([0, len(sample)]))
    context.routes = RouteLog(chosen={})
    network(family).hidden(torch.tensor(sample.tokens).long(), context)
    assert context.routes.chosen is not None
    chosen: np.ndarray = torch.stack([context.routes.chosen[layer] for layer in routing.indices], 1).numpy()
    return chosen.astype(routing.dtype)


def routed(
    folder: Path, family: str, samples: Sequence[Sample], *, shift: int = 0, version: int = VERSION
) -> list[Sample]:
    """Samples with routes of all their tokens but the last: the model's own, each expert's number raised by `shift`."""
    made = []
    for index, sample in enumerate(samples):
        experts = (own_choice(family, sample) + shift) % ROUTINGS[family].experts
        versions = np.where(np.arange(len(sample)) < len(sample) - 1, version, -1).astype(np.int32)
        columns = {"routes": experts.astype(ROUTINGS[family].dtype), "route_versions": versions}
        large = store(columns, ColumnFolder(folder), opening=2, group_id=index, attempt=0)
        made.append(attrs.evolve(sample, large=large))
    return made


def step(
    folder: Path, family: str, batch: Batch, *, routing: Routing | None = None, replay: bool = True
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, float]]:
    """Gradients, sums, and the metrics that become of them."""
    model = network(family)
    recorder = GradientRecorder((name, p) for name, p in model.named_parameters() if p.requires_grad)
    reader = RouteReader(folder=ColumnFolder(folder), routing=routing or ROUTINGS[family])
    report = build_stepper(model, recorder, routes=reader if replay else None).step(batch, batch.ranks[0], 0.0)
    done = StepDone(step=1, version=1, sums=report.sums, values=report.values, seconds=report.seconds)
    return recorder.gradients, dict(report.sums), trainer_metrics(batch, [done])


def route_metrics(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("routes/")}


@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_the_own_choice_changes_no_bit(tmp_path: Path, family: str) -> None:
    samples = random_samples(8)
    batch = pack_batch(routed(tmp_path, family, samples), micro_batch_tokens=30)
    assert len(batch.ranks[0]) > 1
    gradients, _, metrics = step(tmp_path, family, batch)
    plain, _, _ = step(tmp_path, family, batch, replay=False)
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)
    layers = {f"routes/differ/{name}": 0.0 for name in ROUTINGS[family].layers}
    expected = {"routes/replayed": 1.0, "routes/missing": 0.0, "routes/refused": 0.0, "routes/differ": 0.0, **layers}
    assert route_metrics(metrics) == {**expected, "routes/differ_fresh": 0.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_experts_are_trained_and_the_gate_learns_about_them(tmp_path: Path, family: str) -> None:
    samples = random_samples(6)
    gradients, _, metrics = step(tmp_path, family, pack_batch(routed(tmp_path, family, samples, shift=3)))
    plain, _, _ = step(tmp_path, family, pack_batch(samples), replay=False)
    assert metrics["routes/differ"] == metrics["routes/differ_fresh"] == 1.0
    routers = [name for name in gradients if name.endswith("gate.weight")]
    assert len(routers) == len(ROUTINGS[family].layers)
    for name in routers:
        assert gradients[name].norm() > 0
        assert not torch.equal(gradients[name] != 0, plain[name] != 0) or not torch.equal(gradients[name], plain[name])


def test_packing_and_padding_do_not_change_what_is_replayed(tmp_path: Path) -> None:
    samples = routed(tmp_path, "kimi", random_samples(9), shift=7)
    together, sums, _ = step(tmp_path, "kimi", pack_batch(samples))
    for tokens in (12, 30):
        apart, split, _ = step(tmp_path, "kimi", pack_batch(samples[::-1], micro_batch_tokens=tokens))
        assert relative_difference(apart, together) < 1e-5
        assert {n: v for n, v in split.items() if "routes" in n} == {n: v for n, v in sums.items() if "routes" in n}


def test_routes_of_an_older_version_are_replayed_and_told_apart(tmp_path: Path) -> None:
    samples = random_samples(6)
    batch = pack_batch(
        [
            *routed(tmp_path / "a", "kimi", samples[:3], shift=7, version=VERSION - 1),
            *routed(tmp_path / "a", "kimi", samples[3:], version=VERSION),
        ]
    )
    _, sums, metrics = step(tmp_path / "a", "kimi", batch)
    tokens = [len(sample) - 1 for sample in samples]
    assert metrics["routes/differ"] == pytest.approx(sum(tokens[:3]) / sum(tokens))
    assert metrics["routes/differ_fresh"] == 0.0
    assert sums["routes_fresh/count"] == 2 * sum(tokens[3:])


def test_tokens_without_a_route_fall_back_and_are_counted(tmp_path: Path) -> None:
    samples = random_samples(6)
    told = routed(tmp_path, "kimi", samples[:2], shift=7)
    demonstrations = [attrs.evolve(s, sampled=np.zeros(len(s), np.bool_), large={}) for s in samples[4:]]
    batch = pack_batch([*told, *samples[2:4], *demonstrations])
    gradients, _, metrics = step(tmp_path, "kimi", batch)
    tokens = [len(sample) - 1 for sample in samples]
    assert metrics["routes/replayed"] == pytest.approx(sum(tokens[:2]) / sum(tokens[:4]))
    assert metrics["routes/missing"] == pytest.approx(sum(tokens[2:4]) / sum(tokens[:4]))
    silent, _, quiet = step(tmp_path, "kimi", pack_batch(samples))
    assert quiet["routes/missing"] == 1.0
    plain, _, _ = step(tmp_path, "kimi", pack_batch(samples), replay=False)
    assert all(torch.equal(silent[name], plain[name]) for name in plain)
    assert any(not torch.equal(gradients[name], plain[name]) for name in plain)


def test_what_cannot_be_followed_is_refused_and_counted(tmp_path: Path) -> None:
    """A file that is gone, one that was changed, one of another model, and rows that are no choice."""
    samples = random_samples(5)
    told = routed(tmp_path, "kimi", samples)
    (tmp_path / told[0].large["routes"][1].file).unlink()
    content = bytearray((tmp_path / told[1].large["routes"][0].file).read_bytes())
    content[0] ^= 1
    (tmp_path / told[1].large["routes"][0].file).write_bytes(content)
    told[2] = attrs.evolve(told[2], large={"routes": told[2].large["routes"]})
    length = len(samples[3])
    rows = own_choice("kimi", samples[3])
    rows[0], rows[1, 1] = 299, [5, 5]  # one expert twice
    rows[2, 0, 0] = 300  # of 300
    versions = np.full(length, VERSION, np.int32)
    columns = {"routes": rows, "route_versions": versions}
    told[3] = attrs.evolve(told[3], large=store(columns, ColumnFolder(tmp_path), opening=1, group_id=9, attempt=0))
    gradients, _, metrics = step(tmp_path, "kimi", pack_batch(told))
    tokens = [len(sample) - 1 for sample in samples]
    broken = min(3, tokens[3])
    assert metrics["routes/refused"] == pytest.approx((sum(tokens[:3]) + broken) / sum(tokens))
    assert metrics["routes/missing"] == 0.0
    assert metrics["routes/replayed"] == pytest.approx(1 - metrics["routes/refused"])
    plain, _, _ = step(tmp_path, "kimi", pack_batch(samples), replay=False)
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)


def test_a_step_without_sampled_tokens_says_nothing_of_routes(tmp_path: Path) -> None:
    samples = [attrs.evolve(s, sampled=np.zeros(len(s), np.bool_)) for s in random_samples(3)]
    _, sums, metrics = step(tmp_path, "kimi", pack_batch(samples))
    assert not [name for name in sums if "routes" in name]
    assert route_metrics(metrics) == {}


@pytest.mark.parametrize("context", [2, 3])
def test_ranks_that_share_sequences_read_their_share_of_the_routes(tmp_path: Path, context: int) -> None:
    samples = [*routed(tmp_path, "kimi", random_samples(5), shift=7), *random_samples(2, seed=1)]
    reader = RouteReader(folder=ColumnFolder(tmp_path), routing=ROUTINGS["kimi"])
    options = {"step": 6, "version": VERSION, "phase": "rl", "micro_batch_tokens": 1000}
    (whole,) = pack(samples, ranks=1, **options).ranks[0]
    expected = reader.read(whole)
    shares = [reader.read(micro) for (micro,) in pack(samples, ranks=context, context=context, **options).ranks]
    assert np.concatenate([share.experts for share in shares]).tolist() == expected.experts.tolist()
    assert np.concatenate([share.versions for share in shares]).tolist() == expected.versions.tolist()
    assert not np.concatenate([share.refused for share in shares]).any()
    told = expected.versions >= 0
    assert np.concatenate([share.counted for share in shares])[told].all()
