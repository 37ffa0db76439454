"""vLLM's HTTP interface as prl uses it: tokens in and out, pause and resume, calls into workers, metrics.

The shapes of requests and answers are those of the releases in `release.SUPPORTED`. Knows nothing of weights or runs.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import attrs
import numpy as np
from prl.errors import InfrastructureError
from prl.serve.refusal import sentence_in
from prl.types import Completion, Int32, Routes, Sampling, StopReason

from prl_vllm import metrics

CONNECT_SECONDS = 10.0
KEPT_SECONDS = 2.0
"""That a connection may lie idle. vLLM's server closes its end after VLLM_HTTP_TIMEOUT_KEEP_ALIVE = 5; a request that
is sent into a connection at that moment is lost, and nobody may send a POST twice."""
ID_PREFIX = "generate-tokens-"
"""What the server puts before the request ids it is given."""
FINAL_ONLY = 2
"""vLLM's `RequestOutputKind` of all members at once, at the end. Releases before 0.30 do not choose it by themselves,
and lose members that end early."""


@attrs.frozen(kw_only=True)
class Ask:
    """`n` continuations of one prompt."""

    request_id: str
    prompt: Sequence[int]
    sampling: Sampling
    n: int
    stop: Sequence[int]
    salt: str
    """Prompts share what was computed for them only under equal salts."""
    version: int = -1
    """Served when it was sent."""
    routes_from: int | None = None
    """The first token whose routes are wanted; None: none are."""
    kv_transfer: Mapping[str, Any] | None = None
    """What vLLM's connectors are told: whose keys and values to fetch, or that they will be fetched from here."""


@attrs.frozen(kw_only=True)
class Answer:
    completions: tuple[Completion, ...]
    """Versions are -1 on releases that do not tell them."""
    prompt_tokens: int
    reused_tokens: int
    kv_transfer: Mapping[str, Any] | None = None
    """What the server is told that fetches the keys and values of this prompt."""


class RefusedByVllmError(InfrastructureError):
    """The server answered, with a status that is not 200."""


class VllmApi:
    """One keep-alive HTTP session to one server, over its socket where it has one."""

    def __init__(self, url: str, *, socket: Path | None = None, key: str = "") -> None:
        self._url = url.rstrip("/")
        self._socket = socket
        self._key = key
        self._session: aiohttp.ClientSession | None = None

    # --- generation ---------------------------------------------------------------------------------------------------
    async def generate(self, ask: Ask) -> Answer:
        """Cancelling the task aborts the request."""
        answer = json.loads(await self._request("POST", "/inference/v1/generate", generate_body(ask)))
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        usage = answer["usage"]
        details = usage.get("prompt_tokens_details") or {}
        return Answer(
            completions=tuple(_completion(choice, ask) for choice in choices),
            prompt_tokens=usage["prompt_tokens"],
            reused_tokens=details.get("cached_tokens") or 0,
            kv_transfer=answer.get("kv_transfer_params"),
        )

    async def stream(self, ask: Ask, tell: Callable[[int, Int32], None]) -> Answer:
        """As `generate`, and `tell(member, tokens so far)` as they come."""
        members = [_Member() for _ in range(ask.n)]
        async for choice in self._choices({**generate_body(ask), "stream": True}):
            member = members[choice["index"]]
            member.add(choice)
            tell(choice["index"], np.asarray(member.tokens, np.int32))
        completions = tuple(member.completion() for member in members)
        return Answer(completions=completions, prompt_tokens=len(ask.prompt), reused_tokens=0)

    async def _choices(self, body: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
        path = "/inference/v1/generate"
        try:
            async with self._send("POST", path, body) as response:
                await _expect_ok(response, self._url + path)
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        for choice in json.loads(line.removeprefix(b"data: ")).get("choices") or ():
                            yield choice
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise InfrastructureError(f"{self._url}{path} broke off: {type(error).__name__}: {error}") from error

    async def abort(self, request_id: str) -> None:
        """Whoever waits for it gets the tokens so far."""
        await self._request("POST", "/abort_requests", {"request_ids": [ID_PREFIX + request_id]})

    # --- control ------------------------------------------------------------------------------------------------------
    async def pause(self, *, clear_cache: bool, keep: bool = True) -> None:
        """Compute nothing from here on. `clear_cache` forgets what was computed; requests are kept, or aborted."""
        flag, mode = str(clear_cache).lower(), "keep" if keep else "abort"
        await self._request("POST", f"/pause?mode={mode}&clear_cache={flag}")

    async def resume(self) -> None:
        await self._request("POST", "/resume")

    async def set_version(self, version: int) -> None:
        """What the tokens sampled from here on are marked with."""
        await self._request("POST", "/update_weight_version", {"new_version": str(version)})

    async def call(self, method: str, **arguments: Any) -> list[Any]:
        """Call a method of every worker between two steps; what each returns."""
        answer = await self._request("POST", "/collective_rpc", {"method": method, "kwargs": arguments})
        results: list[Any] = json.loads(answer)["results"]
        return results

    # --- watching -----------------------------------------------------------------------------------------------------
    async def healthy(self) -> bool:
        try:
            await self._request("GET", "/health")
        except InfrastructureError:
            return False
        return True

    async def metrics(self) -> Mapping[str, float]:
        """As `metrics.read` has them."""
        return metrics.read((await self._request("GET", "/metrics")).decode())

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()

    # --- HTTP ---------------------------------------------------------------------------------------------------------
    async def _request(self, method: str, path: str, body: Any = None) -> bytes:
        try:
            async with self._send(method, path, body) as response:
                await _expect_ok(response, self._url + path)
                return await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise InfrastructureError(f"{self._url}{path} does not answer: {type(error).__name__}: {error}") from error

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        return self._open().request(method, self._url + path, json=body)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            kept: dict[str, Any] = {"limit": 0, "keepalive_timeout": KEPT_SECONDS}
            connector = (
                aiohttp.UnixConnector(str(self._socket), **kept)
                if self._socket is not None
                else aiohttp.TCPConnector(**kept)
            )
            self._session = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                connector=connector,
                read_bufsize=1 << 20,  # an event of a stream is one line
            )
        return self._session


async def _expect_ok(response: aiohttp.ClientResponse, url: str) -> None:
    if response.status != 200:
        raise RefusedByVllmError(f"{url} answered {response.status}: {sentence_in(await response.read())}")


def routes(choice: Mapping[str, Any], ask: Ask, completion: Completion) -> Routes | None:
    """Of the tokens from `ask.routes_from` on, as far as the server says; None when it says nothing.

    A row is of the version that was served when its token was computed: a sampled token is computed where the next one
    is sampled; the prompt under the version it was sent to, if the first token was sampled under that one too.
    """
    if not choice.get("routed_experts"):
        return None
    experts = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])), allow_pickle=False)
    whole = np.full(len(ask.prompt) + len(completion.tokens) - 1, -1, np.int32)
    whole[len(ask.prompt) :] = completion.versions[1:]
    if len(completion.tokens) and completion.versions[0] == ask.version:
        whole[: len(ask.prompt)] = ask.version
    start = len(whole) - len(experts)
    if not 0 <= start <= (ask.routes_from or 0):
        raise InfrastructureError(f"vLLM reports routes of {len(experts)} tokens where {len(whole)} were computed")
    skipped = (ask.routes_from or 0) - start
    layers = tuple(f"layers.{index}" for index in range(experts.shape[1]))
    return Routes(layers=layers, experts=experts[skipped:], versions=whole[start + skipped :], start=start + skipped)


def generate_body(ask: Ask) -> dict[str, Any]:
    """The question as `/inference/v1/generate` has it."""
    sampling = ask.sampling
    transfer = {} if ask.kv_transfer is None else {"kv_transfer_params": dict(ask.kv_transfer)}
    return {
        "request_id": ask.request_id,
        "token_ids": list(ask.prompt),
        "cache_salt": ask.salt,
        **transfer,
        "sampling_params": {
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_tokens,
            "min_tokens": sampling.min_tokens,
            "seed": sampling.seed,
            "n": ask.n,
            "stop_token_ids": list(ask.stop),
            "ignore_eos": True,  # the renderer's stop tokens are all there are
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
            "output_kind": FINAL_ONLY,
            **({"routed_experts_prompt_start": ask.routes_from} if ask.routes_from else {}),
            **({"extra_args": transfer} if transfer else {}),  # where releases before 0.30 look for it
        },
    }


def _completion(choice: Mapping[str, Any], ask: Ask) -> Completion:
    member = _Member()
    member.add(choice)
    completion = member.completion()
    return completion if ask.routes_from is None else attrs.evolve(completion, routes=routes(choice, ask, completion))


@attrs.define
class _Member:
    """One continuation, from one choice or from those of a stream."""

    tokens: list[int] = attrs.field(factory=list)
    logprobs: list[float] = attrs.field(factory=list)
    last: Mapping[str, Any] = attrs.field(factory=dict)

    def add(self, choice: Mapping[str, Any]) -> None:
        self.tokens += choice["token_ids"]
        self.logprobs += [entry["logprob"] for entry in (choice["logprobs"] or {}).get("content") or ()]
        self.last = choice

    def completion(self) -> Completion:
        """InfrastructureError when it ended without an end."""
        reason = self.last.get("finish_reason")
        if reason is None:
            raise InfrastructureError(f"vLLM ended a continuation after {len(self.tokens)} tokens without a reason")
        return Completion(
            tokens=np.asarray(self.tokens, np.int32),
            logprobs=np.asarray(self.logprobs, np.float32),
            versions=_versions(self.last, len(self.tokens)),
            stop=StopReason(reason),
        )


def _versions(choice: Mapping[str, Any], count: int) -> Int32:
    """[count] from the spans in which the server says which version sampled which tokens, -1 where it does not."""
    versions = np.full(count, -1, np.int32)
    for span in choice.get("weight_versions") or ():
        versions[span["start"] : span["end"]] = int(span["version"])
    return versions
