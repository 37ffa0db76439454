"""The engine's endpoints under fire: every request is answered with a sentence, and the engine samples as before."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prl import wire
from prl.serve.columns import Completions, pack, unpack
from prl.types import Completion, Manifest, Sampling, StopReason, as_tokens

from tests.fuzz.hostile import fuzzed, nested, numbers
from tests.plugins.served_engine import TOKEN, Served, serving
from tests.plugins.tiny_engine import tiny_model

SLOWEST = 10.0  # seconds for one request; what it asks for is a few tokens of a tiny model
GENERATE = {
    "token_ids": [2, 3, 4],
    "session": "",
    "request_id": "",
    "sampling_params": {
        "temperature": 1.0,
        "max_tokens": 3,
        "min_tokens": 0,
        "seed": 7,
        "n": 2,
        "stop_token_ids": [1],
        "logprobs": 0,
    },
}
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 3,
    "n": 1,
    "temperature": 0.5,
    "seed": 1,
    "stream": False,
    "stream_options": {"include_usage": True},
    "logprobs": True,
}
BODIES: dict[str, Any] = {
    "/inference/v1/generate": GENERATE,
    "/v1/chat/completions": CHAT,
    "/abort": {"request_id": "x"},
    "/weights/commit": {"version": 0},
}
GREEDY = Sampling(temperature=0.0, max_tokens=8)


@attrs.define(eq=False)
class Target:
    """An engine in a loop of its own, which stands still between two examples."""

    runner: asyncio.Runner = attrs.field(factory=asyncio.Runner)
    served: Served = attrs.field(init=False)
    manifest: Manifest = attrs.field(init=False)
    expected: list[int] = attrs.field(init=False)
    tasks: int = attrs.field(init=False)
    _stack: AsyncExitStack = attrs.field(factory=AsyncExitStack)
    _session: aiohttp.ClientSession = attrs.field(init=False)

    def run(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    async def open(self, folder: Any) -> None:
        self.served = await self._stack.enter_async_context(serving(folder))
        self._session = await self._stack.enter_async_context(aiohttp.ClientSession())
        self.manifest = self.served.write(0, tiny_model())
        self.expected = await self.sample()
        self.tasks = len(asyncio.all_tasks())

    async def close(self) -> None:
        await self._stack.aclose()

    async def sample(self) -> list[int]:
        completions = await self.served.client.generate([2, 3, 4], GREEDY, stop=[])
        tokens: list[int] = completions[0].tokens.tolist()
        return tokens

    async def post(self, path: str, body: bytes, token: str = TOKEN) -> tuple[int, str]:
        """Status and sentence; None where a healthy request ran out of time."""
        headers = {"Authorization": f"Bearer {token}"}
        async with (
            asyncio.timeout(SLOWEST),
            self._session.post(self.served.url + path, data=body, headers=headers) as answer,
        ):
            content = await answer.read()
        if answer.status == 200:
            return 200, ""
        return answer.status, json.loads(content)["error"]["message"]

    async def unharmed(self) -> None:
        assert await self.sample() == self.expected
        statistics = await self.served.client.statistics()
        assert (statistics["version"], statistics["running"], statistics["waiting"]) == (0, 0, 0)
        assert len(asyncio.all_tasks()) <= self.tasks + 2  # a connection of the pool may be open or not


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    target = Target()
    with target.runner:
        target.run(target.open(tmp_path_factory.mktemp("engine")))
        yield target
        target.run(target.close())


# --- bodies -----------------------------------------------------------------------------------------------------------
@st.composite
def replaced(draw: Any, good: Any) -> Any:
    """`good` with one value, at any depth, replaced, removed or accompanied by one more."""
    value = json.loads(json.dumps(good))
    place, key = {"body": value}, "body"
    root = place
    while isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 3)):
        place = place[key]
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
        case "replace":
            place[key] = draw(nested | numbers | st.lists(numbers, max_size=5))
        case "remove" if place is not root:
            del place[key]
        case _ if isinstance(place, dict):
            place[draw(st.text(max_size=8))] = draw(nested)
    return root.get("body")


def _modest(value: Any) -> bool:
    """Whether it asks for little work; refusing is what is tested, not how fast the engine can sample."""
    if not isinstance(value, dict):
        return True
    params = value.get("sampling_params", value)
    limits = ("max_tokens", "max_completion_tokens", "n")
    return not isinstance(params, dict) or all(
        not isinstance(params.get(limit), int) or params[limit] <= 8 for limit in limits
    )


def _as_json(value: Any) -> bytes:
    return json.dumps(value).encode(errors="surrogatepass")


bodies = st.sampled_from(sorted(BODIES)).flatmap(
    lambda path: st.tuples(st.just(path), replaced(BODIES[path]).filter(_modest).map(_as_json))
)
garbage = st.tuples(
    st.sampled_from([*BODIES, "/weights/prepare"]),
    st.binary(max_size=100)
    | nested.map(_as_json)
    | st.integers(1, 100_000).map(lambda n: b"[" * n)
    | st.integers(1, 10_000).map(lambda n: b'{"seed": ' + b"9" * n + b"}"),
)


@fuzzed
@given(request=bodies | garbage)
def test_every_request_is_answered_and_changes_nothing(target, request):
    path, body = request
    status, sentence = target.run(target.post(path, body))
    assert status == 200 or (400 <= status < 500 and sentence)
    target.run(target.unharmed())


@fuzzed
@given(token=st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=80))
def test_nothing_is_done_without_the_token(target, token):
    if token != TOKEN:
        assert target.run(target.post("/weights/commit", b'{"version": 0}', token))[0] == 401


# --- manifests --------------------------------------------------------------------------------------------------------
def _plain(manifest: Manifest) -> Any:
    return attrs.asdict(manifest)


@fuzzed
@given(data=st.data())
def test_a_manifest_that_lies_is_refused_and_the_served_weights_stay(target, data):
    fields = data.draw(replaced(_plain(target.manifest)))
    status, sentence = target.run(target.post("/weights/prepare", _as_json(fields)))
    assert status == 200 or (400 <= status < 500 and sentence)
    target.run(target.unharmed())


@pytest.mark.parametrize(
    "location", ["/dev/zero", "/etc/hostname", "/proc/self/mem", "../model.safetensors", "\0", "a" * 9999]
)
def test_weights_are_read_from_where_weights_lie(target, location):
    manifest = attrs.evolve(target.manifest, parts=(attrs.evolve(target.manifest.parts[0], location=location),))
    status, sentence = target.run(target.post("/weights/prepare", _as_json(_plain(manifest))))
    assert status == 422
    assert "version 0" in sentence
    target.run(target.unharmed())


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (1 << 62, 1 << 62)},
        {"shape": (1 << 70,)},
        {"shape": (-1,), "nbytes": -4},
        {"nbytes": 1 << 62},
        {"offset": (1 << 63) - 1},
        {"offset": -8},
        {"dtype": "Tensor"},
        {"dtype": "complex64"},
        {"dtype": "__class__"},
    ],
)
def test_a_record_that_contradicts_itself_is_refused(target, change):
    tensors = (attrs.evolve(target.manifest.tensors[0], **change), *target.manifest.tensors[1:])
    fields = _plain(attrs.evolve(target.manifest, parts=(attrs.evolve(target.manifest.parts[0], tensors=tensors),)))
    status, sentence = target.run(target.post("/weights/prepare", _as_json(fields)))
    assert status in (400, 422)
    assert sentence
    target.run(target.unharmed())


# --- what a client reads ----------------------------------------------------------------------------------------------
ANSWER = pack(
    Completions(
        request_id="x",
        completions=(
            Completion(
                tokens=as_tokens(range(2000)),
                logprobs=as_tokens(range(2000)).astype("float32"),
                versions=as_tokens([0] * 2000),
                stop=StopReason.STOP,
            ),
        ),
        prompt_tokens=3,
        reused_tokens=0,
    )
)


@fuzzed
@given(data=st.data())
def test_a_client_survives_what_an_engine_answers(data):
    body = bytearray(ANSWER)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(300, len(body) - 1)) | st.integers(0, len(body) - 1))
        body[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(body)) | st.integers(0, len(body)))
    try:
        message = unpack(bytes(body[:cut]), Completions)
    except wire.WireError:
        return
    assert sum(completion.tokens.size for completion in message.completions) <= len(body) // 4


def test_the_manifest_itself_is_accepted(target):
    assert target.run(target.post("/weights/prepare", _as_json(_plain(target.manifest)))) == (200, "")
