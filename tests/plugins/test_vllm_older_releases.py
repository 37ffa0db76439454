"""What the engine does for releases of vLLM that tell no versions and refuse routes beside a connector."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import attrs
import numpy as np
import pytest
from prl.serve.refusal import RefusedError
from prl.serve.requests import Request
from prl.types import Completion, Routes, Sampling, StopReason
from prl_vllm.api import Answer, Ask, VllmApi, generate_body
from prl_vllm.engine import Engine
from prl_vllm.handover import TO_BE_FETCHED, Handed, Prefills
from prl_vllm.inside import handed_routes

PROMPT = [5, 6, 7, 8]


def routes(start: int, rows: int, version: int) -> Routes:
    experts = np.zeros((rows, 1, 2), np.uint8)
    return Routes(layers=("layers.0",), experts=experts, versions=np.full(rows, version, np.int32), start=start)


def answer(stop: StopReason, told: Routes, *, transfer: bool = True) -> Answer:
    """One token; no version of it is told."""
    completion = Completion(
        tokens=np.asarray([9], np.int32),
        logprobs=np.zeros(1, np.float32),
        versions=np.full(1, -1, np.int32),
        stop=stop,
        routes=told,
    )
    kept = {"remote_block_ids": [1]} if transfer else None
    return Answer(completions=(completion,), prompt_tokens=4, reused_tokens=0, kv_transfer=kept)


@attrs.define
class Server:
    """Answers in turn."""

    answers: list[Answer]
    asked: list[Ask] = attrs.field(factory=list)

    async def generate(self, ask: Ask) -> Answer:
        self.asked.append(ask)
        return self.answers.pop(0)


@attrs.frozen
class Elsewhere:
    """The engine that computes prompts."""

    handed: Handed

    async def compute(self, *_: object, **__: object) -> Handed:
        return self.handed

    async def within_patience(self, fetching: Any) -> bool:
        await fetching
        return True


def engine(server: Server, prefills: Elsewhere | None = None) -> Engine:
    made = Engine(
        cast(VllmApi, server),
        run_dir="",
        shapes={},
        length=64,
        vocab_size=32,
        sequences=4,
        recompute=False,
        tells_versions=False,
        prefills=cast(Prefills | None, prefills),
    )
    made.version = 3
    return made


def request() -> Request:
    return Request(
        prompt=np.asarray(PROMPT, np.int32),
        sampling=Sampling(max_tokens=1, temperature=0.0),
        n=1,
        stop=(),
        request_id="r",
        routes_from=0,
    )


def test_routes_of_a_prompt_computed_for_another_engine_are_of_the_served_version() -> None:
    async def work() -> Handed:
        return await engine(Server([answer(StopReason.LENGTH, routes(0, 4, -1))])).prefill(request(), "")

    handed = asyncio.run(work())
    assert handed.routes is not None
    assert handed.routes.versions.tolist() == [3, 3, 3, 3]


def test_a_prompt_that_an_update_aborts_is_refused_as_one_of_other_weights() -> None:
    async def work() -> None:
        await engine(Server([answer(StopReason.ABORT, routes(0, 0, -1), transfer=False)])).prefill(request(), "")

    with pytest.raises(RefusedError) as refused:
        asyncio.run(work())
    assert refused.value.status == 409


def test_after_a_hand_over_no_token_beyond_the_prompt_is_asked_for() -> None:
    """vLLM ends when the first token whose routes are wanted lies behind the prompt."""
    server = Server([answer(StopReason.LENGTH, routes(0, 4, -1)), answer(StopReason.LENGTH, routes(3, 1, -1))])

    async def work() -> Any:
        return await engine(server, Elsewhere(Handed(transfer="{}", routes=routes(0, 4, 3)))).generate(request())

    (completion,) = asyncio.run(work()).completions
    assert [ask.routes_from for ask in server.asked] == [None, 3]
    assert completion.routes.start == 0
    assert completion.routes.versions.tolist() == [3, 3, 3, 3]


def test_what_connectors_are_told_is_among_the_sampling_parameters_too() -> None:
    """Releases before 0.30 look for it there alone."""

    async def work() -> Ask:
        server = Server([answer(StopReason.LENGTH, routes(0, 4, -1))])
        await engine(server).prefill(request(), "")
        return server.asked[0]

    asked = asyncio.run(work())
    assert asked.kv_transfer == TO_BE_FETCHED
    told = {"kv_transfer_params": dict(TO_BE_FETCHED)}
    assert generate_body(asked).items() >= told.items()
    assert generate_body(asked)["sampling_params"]["extra_args"] == told
    assert "extra_args" not in generate_body(attrs.evolve(asked, kv_transfer=None))["sampling_params"]


# --- the refusal ------------------------------------------------------------------------------------------------------
@attrs.define
class Section:
    enable_return_routed_experts: bool = False
    kv_connector: str | None = None
    kv_connector_extra_config: dict[str, Any] = attrs.field(factory=dict)


@attrs.define
class Config:
    model_config: Section
    kv_transfer_config: Section | None
    seen: bool | None = None

    def check(self) -> None:
        """As vLLM 0.26's."""
        self.seen = self.model_config.enable_return_routed_experts
        if self.seen and self.kv_transfer_config is not None:
            raise ValueError("incompatible with KV connectors")


def several(*names: str) -> Section:
    connectors = [{"kv_connector": name, "kv_role": "kv_both"} for name in names]
    return Section(kv_connector="MultiConnector", kv_connector_extra_config={"connectors": connectors})


@pytest.mark.parametrize(
    "transfer",
    [
        Section(kv_connector="NixlConnector"),
        Section(kv_connector="OffloadingConnector"),
        several("NixlConnector", "OffloadingConnector"),
    ],
)
def test_routes_beside_hand_over_and_tiers_are_not_refused_and_still_reported(transfer: Section) -> None:
    config = Config(Section(True), transfer)
    handed_routes.unrefused(Config.check)(config)
    assert config.seen is False
    assert config.model_config.enable_return_routed_experts


@pytest.mark.parametrize(
    "transfer", [Section(kv_connector="LMCacheConnector"), several("NixlConnector", "LMCacheConnector"), several()]
)
def test_routes_beside_other_connectors_stay_refused(transfer: Section) -> None:
    config = Config(Section(True), transfer)
    with pytest.raises(ValueError, match="incompatible"):
        handed_routes.unrefused(Config.check)(config)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_server_without_connectors_is_checked_as_ever(wanted: bool) -> None:
    config = Config(Section(wanted), None)
    handed_routes.unrefused(Config.check)(config)
    assert config.seen is wanted
