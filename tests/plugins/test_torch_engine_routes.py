"""Routes of the embedded engine: those the model itself would choose, whatever was reused, and of the right version."""

from __future__ import annotations

import asyncio
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from prl.blocks.context import Context
from prl.blocks.decoder import Decoder
from prl.blocks.routing import RouteLog
from prl.compose.routing import Routing
from prl.routes import RouteRecord, checked
from prl.serve.requests import Request
from prl.types import Completion, Sampling
from prl_kimi_k2 import KimiK27Config
from prl_kimi_k2 import network as kimi
from prl_kimi_k2.sizes import routing as kimi_routing
from prl_nemotron3 import UltraConfig
from prl_nemotron3 import network as nemotron
from prl_nemotron3.sizes import routing as nemotron_routing
from prl_torch_engine.scheduler import Scheduler

from tests.plugins.served_engine import serving
from tests.plugins.tiny_engine import VOCAB, finish, request

PROMPT = [3, 7, 11, 2, 9, 30, 12, 5]
KIMI = KimiK27Config(hidden_size=32, layers=3, experts=300, experts_per_token=4, expert_intermediate_size=8)
ULTRA = UltraConfig(hidden_size=32, pattern="MEM*E", experts=8, experts_per_token=3, expert_intermediate_size=8)
ROUTINGS = {"kimi": kimi_routing(KIMI), "nemotron": nemotron_routing(ULTRA)}


def model(family: str = "kimi", seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    made = kimi.build(KIMI, VOCAB) if family == "kimi" else nemotron.build(ULTRA, VOCAB)
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if tensor.dim() >= 2 or name.endswith("e_score_correction_bias"):
                tensor.normal_(0.0, 0.25)
    return made.eval().requires_grad_(False)


def engine(family: str = "kimi", *, routing: Routing | None = None, prefill_tokens: int = 5) -> Scheduler:
    made = Scheduler(
        model(family),
        sequences=4,
        retained=6,
        length=64,
        prefill_tokens=prefill_tokens,
        routing=routing or ROUTINGS[family],
    )
    made.set_version(0)
    return made


def asking(name: str, prompt: list[int], *, routes_from: int | None = 0, **options: int | str) -> Request:
    return attrs.evolve(request(name, prompt, **options), routes_from=routes_from)  # type: ignore[arg-type]


@torch.no_grad()
def own_choice(network: Decoder, tokens: list[int], routing: Routing) -> np.ndarray:
    """[T, M, K] sorted, of a forward pass over the whole sequence."""
    context = Context.packed(torch.tensor([0, len(tokens)]))
    context.routes = RouteLog(chosen={})
    network.hidden(torch.tensor(tokens), context)
    assert context.routes.chosen is not None
    chosen: np.ndarray = torch.stack([context.routes.chosen[layer] for layer in routing.indices], 1).numpy()
    return np.sort(chosen)


def expect(prompt: list[int], completion: Completion, family: str = "kimi", *, start: int = 0, seed: int = 0) -> None:
    routing, routes = ROUTINGS[family], completion.routes
    assert routes is not None
    tokens = [*prompt, *completion.tokens.tolist()]
    assert (routes.layers, routes.start) == (routing.layers, start)
    assert routes.experts.dtype == routing.dtype
    assert checked(routes, routing, tokens=len(tokens)).experts is routes.experts
    expected = own_choice(model(family, seed), tokens, routing)[start:-1]
    assert np.sort(routes.experts).tolist() == expected.tolist()


@pytest.mark.parametrize("family", ROUTINGS)
def test_routes_are_those_of_a_forward_pass_over_the_whole_sequence(family: str) -> None:
    requests = [asking(str(i), [*PROMPT[i:], 17], n=2, max_tokens=5 + 3 * i, seed=i) for i in range(3)]
    results = finish(engine(family), *requests)
    for index in range(3):
        for completion in results[str(index)].completions:
            expect([*PROMPT[index:], 17], completion, family)


def test_a_reused_prefix_brings_its_routes_along() -> None:
    serving = engine()
    (first,) = finish(serving, asking("a", PROMPT, session="s", max_tokens=6))["a"].completions
    extended = [*PROMPT, *first.tokens.tolist(), 4, 8]
    result = finish(serving, asking("b", extended, session="s", max_tokens=6))["b"]
    assert result.reused_tokens == len(PROMPT) + 5
    expect(extended, result.completions[0])
    later = finish(serving, asking("c", extended, routes_from=13, max_tokens=6))["c"].completions[0]
    expect(extended, later, start=13)


def test_two_turns_make_the_routes_of_the_whole_conversation() -> None:
    serving, record = engine(), RouteRecord()
    (first,) = finish(serving, asking("a", PROMPT, session="s", max_tokens=6))["a"].completions
    record.add(first.routes)
    extended = [*PROMPT, *first.tokens.tolist(), 4, 8]
    (second,) = finish(serving, asking("b", extended, routes_from=record.known, session="s"))["b"].completions
    record.add(second.routes)
    tokens = [*extended, *second.tokens.tolist()]
    columns = record.columns(len(tokens))
    expected = own_choice(model(), tokens, ROUTINGS["kimi"])
    assert np.sort(columns["routes"])[:-1].tolist() == expected[:-1].tolist()
    assert columns["route_versions"].tolist() == [0] * (len(tokens) - 1) + [-1]


def test_every_token_has_the_version_that_computed_it() -> None:
    serving = engine(prefill_tokens=64)
    serving.add(asking("a", PROMPT, max_tokens=8, session="s"))
    with torch.inference_mode():
        for _ in range(4):
            serving.step()
        serving.set_version(1)
        while serving.busy:
            serving.step()
    ((result,), _) = serving.take()
    (completion,) = result.completions
    assert completion.routes is not None
    # A token is sampled by one pass and computed, hence routed, by the next.
    assert completion.routes.versions[len(PROMPT) :].tolist() == completion.versions[1:].tolist()
    assert completion.routes.versions[: len(PROMPT)].tolist() == [0] * len(PROMPT)
    assert set(completion.routes.versions.tolist()) == {0, 1}
    (again,) = finish(serving, asking("b", PROMPT))["b"].completions
    assert again.routes is not None
    assert set(again.routes.versions.tolist()) == {1}


def test_nobody_is_told_what_was_not_asked_for() -> None:
    serving = engine()
    assert finish(serving, asking("a", PROMPT, routes_from=None))["a"].completions[0].routes is None
    plain = Scheduler(model(), sequences=2, retained=2, length=64, prefill_tokens=64)
    plain.set_version(0)
    assert finish(plain, asking("a", PROMPT))["a"].completions[0].routes is None


def test_rows_that_move_take_their_routes_with_them() -> None:
    """Short sequences leave holes that the last rows fill."""
    requests = [asking(str(i), PROMPT, max_tokens=2 + 4 * (i % 2), seed=i) for i in range(4)]
    results = finish(engine(), *requests)
    for name in map(str, range(4)):
        expect(PROMPT, results[name].completions[0])


def test_routes_travel_to_the_client(tmp_path: Path) -> None:
    network = model()

    async def scene() -> list[Completion]:
        async with serving(tmp_path, network, routing=ROUTINGS["kimi"]) as served:
            return await served.client.generate(PROMPT, Sampling(max_tokens=6, seed=2), stop=[], n=2, routes_from=3)

    for completion in asyncio.run(scene()):
        expect(PROMPT, completion, start=3)
