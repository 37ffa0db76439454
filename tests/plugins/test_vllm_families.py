"""vLLM serves every family the trainer has: the same logprobs, and after an update every tensor bit for bit as sent."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np
import pytest

from tests.plugins.served_vllm import Served, k3, needs_vllm, serving

pytestmark = needs_vllm

LENGTH = 256
MLA = ("model.kv_rank=512", "model.rope_dim=64", "model.layers=2")
"""The kernel of vLLM's CPU backend exists for these widths alone."""


@attrs.frozen
class Family:
    plugin: str
    edits: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    """Parts of the names of tensors that vLLM has no place for."""


FAMILIES = {
    "qwen3 with experts": Family(
        "qwen3",
        ("model.layers=2", "model.experts=8", "model.experts_per_token=2", "model.expert_intermediate_size=64"),
    ),
    "kimi-k2": Family("kimi_k2", ('model.type="kimi-k2"', *MLA)),
    "glm-5.1": Family(
        "glm5",
        ('model.type="glm-5.1"', *MLA, "model.expert_intermediate_size=64", f"model.index_top_k={LENGTH}"),
        (".indexer.",),
    ),
    "nemotron-3": Family("nemotron3", ('model.type="nemotron-3-nano"',)),
}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda name: name.replace(" ", "_"))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Family, Served]]:
    """One server at a time, through shared memory, computing keys and values again after updates."""
    chosen = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("vllm") / "run"
    edits = ('engine.on_update="recompute"', f"engine.length={LENGTH}", *chosen.edits)
    with serving(folder, *edits, plugins=f"vllm,{chosen.plugin}") as served:
        yield chosen, served


def test_the_mismatch_of_fresh_tokens_is_float_noise_after_every_update(family: tuple[Family, Served]) -> None:
    chosen, engine = family
    for version in (0, 1, 2):
        manifest = engine.publish(version, seed=version + 1)
        gaps = engine.gaps(engine.prompts(3, 40, 17, seed=version))
        assert len(gaps) >= 100
        assert k3(gaps) < 1e-6
        assert np.abs(gaps).mean() < 1e-4
        sent = {record.name: record.checksum for record in manifest.tensors}
        ignored = {name for name in sent if any(part in name for part in chosen.ignored)}
        assert engine.get("/weights/checksums") == {name: sent[name] for name in sent.keys() - ignored}


def test_experts_are_those_the_trainer_would_choose(family: tuple[Family, Served]) -> None:
    """Prompt and completion, siblings and a later turn included."""
    _, engine = family
    version = int(engine.statistics()["version"])
    (prompt,) = engine.prompts(150, seed=5)
    for completion in engine.routed(prompt, n=2, max_tokens=20, seed=3):
        routes = completion.routes
        assert routes is not None
        tokens = [*prompt, *completion.tokens.tolist()]
        assert (routes.start, len(routes.versions)) == (0, len(tokens) - 1)
        assert set(routes.versions.tolist()) == {version}
        chosen = engine.trainer.chosen(tokens)
        assert chosen
        for layer, expected in chosen.items():
            reported = routes.experts[:, routes.layers.index(layer)]
            agree = np.sort(reported, 1) == np.sort(expected[:-1], 1)
            assert agree.all(1).mean() > 0.99  # near ties may go either way
    longer = [*prompt, *completion.tokens.tolist()]
    (later,) = engine.routed(longer, routes_from=160, max_tokens=4, seed=4)
    assert later.routes is not None
    assert (later.routes.start, len(later.routes.versions)) == (160, len(longer) + 4 - 1 - 160)


def test_it_stops_when_told(family: tuple[Family, Served]) -> None:
    """The last test with each server: it is gone afterwards."""
    _, engine = family
    assert engine.stopped() == 0
