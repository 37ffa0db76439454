"""The policy as a conversation sees it: tokens in, tokens with logprobs and versions out.

`Policy` holds one client per engine and belongs to the process. `Siblings` belongs to one group: the first turns of its
rollouts usually ask the same thing, and those that do are sent as one request. Neither knows messages or tasks. The
group runner builds them, conversations call them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import attrs

from prl.compose.routing import Routing
from prl.errors import InfrastructureError
from prl.providers import EngineClient, ResumableClient
from prl.routes import checked
from prl.types import Completion, Sampling, StopReason

logger = logging.getLogger(__name__)

Connect: TypeAlias = Callable[[str, str], EngineClient]
"""`(url, token) -> EngineClient`: the `connect` part of an engine provider."""


class EngineError(InfrastructureError):
    """An engine did not answer a request as it should; the message names its URL."""


class Policy:
    """Clients of the engines, one per URL, connected when first asked and kept until `aclose`.

    `routing` is that of a model whose routes the run replays; `resumable` are engines whose clients are
    `ResumableClient`s.
    """

    def __init__(
        self, connect: Connect, token: str, *, routing: Routing | None = None, resumable: bool = False
    ) -> None:
        self._connect = connect
        self._token = token
        self.routing = routing
        self.resumable = resumable
        self._clients: dict[str, EngineClient] = {}

    async def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        stop: Sequence[int],
        engine: str,
        n: int = 1,
        session: str = "",
        routes_from: int | None = None,
        request_id: str = "",
    ) -> list[Completion]:
        """`n` continuations of prompt by the engine at URL `engine`, each at least one token long.

        Their routes, where asked for, are of the model's layers in the model's order. EngineError when it cannot answer
        or was told to abort. Cancelling the task aborts the request.
        """
        try:
            client = self._clients.get(engine)
            if client is None:
                client = self._clients[engine] = self._connect(engine, self._token)
            named = {"request_id": request_id} if self.resumable else {}
            completions = await client.generate(
                prompt, sampling, stop=stop, n=n, session=session, routes_from=routes_from, **named
            )
            _check(completions, n, engine)
            if routes_from is None or self.routing is None:
                return completions
            return await asyncio.to_thread(_with_checked_routes, completions, self.routing, len(prompt))
        except EngineError:
            raise
        except InfrastructureError as error:
            raise EngineError(f"engine {engine}: {error}") from error

    async def so_far(self, request_id: str, *, engine: str, prompt: int) -> list[Completion]:
        """What each continuation of a request has; none of one that has ended. EngineError when it cannot tell."""
        client = self._clients.get(engine)
        if client is None:
            return []
        try:
            completions = await cast(ResumableClient, client).so_far(request_id)
            for completion in completions:
                _check_columns(completion, engine)
            if self.routing is None:
                return completions
            return await asyncio.to_thread(_with_checked_routes, completions, self.routing, prompt)
        except EngineError:
            raise
        except InfrastructureError as error:
            raise EngineError(f"engine {engine}: {error}") from error

    async def aclose(self) -> None:
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.aclose()


def _check(completions: Sequence[Completion], n: int, engine: str) -> None:
    if len(completions) != n:
        raise EngineError(f"engine {engine} returned {len(completions)} completions where {n} were asked for")
    for completion in completions:
        if completion.stop is StopReason.ABORT:
            raise EngineError(f"engine {engine} aborted the request after {len(completion.tokens)} tokens")
        if not len(completion.tokens):
            raise EngineError(f"engine {engine} returned a completion without tokens")
        _check_columns(completion, engine)


def _check_columns(completion: Completion, engine: str) -> None:
    columns = {len(completion.tokens), len(completion.logprobs), len(completion.versions)}
    if len(columns) != 1:
        raise EngineError(f"engine {engine} returned a completion whose columns differ in length: {columns}")


def _with_checked_routes(completions: Sequence[Completion], routing: Routing, prompt: int) -> list[Completion]:
    return [
        c if c.routes is None else attrs.evolve(c, routes=checked(c.routes, routing, tokens=prompt + len(c.tokens)))
        for c in completions
    ]


@attrs.frozen(kw_only=True, eq=False)
class _Request:
    prompt: Sequence[int]
    sampling: Sampling
    stop: Sequence[int]
    answer: asyncio.Future[Completion]

    def continues(self, other: _Request) -> bool:
        """Whether an engine asked for one more member of `other` would sample what this request asks for."""
        return (
            self.sampling == attrs.evolve(other.sampling, seed=other.sampling.seed + 1)
            and (self.prompt is other.prompt or list(self.prompt) == list(other.prompt))
            and self.stop == other.stop
        )


class Siblings:
    """The requests of one group, to one engine.

    First turns that arrive in the same turn of the event loop and differ only in contiguous seeds are one request with
    `n` members. Member `i` samples with `seed + i`, so the tokens are those of separate requests. The tasks that carry
    them live in the group's TaskGroup: they end with it, and a request ends early when nobody waits for it any more.
    """

    def __init__(self, policy: Policy, *, engine: str, tasks: asyncio.TaskGroup, routes: bool = False) -> None:
        self._policy = policy
        self._routes = routes
        self._engine = engine
        self._tasks = tasks
        self._waiting: list[_Request] = []
        self._sent: dict[str, tuple[int, int]] = {}
        """Requests that are not answered: id -> seed of the first member, tokens of the prompt."""

    @property
    def resumable(self) -> bool:
        """Whether the engine goes on with a turn that was cut short."""
        return self._policy.resumable

    async def so_far(self) -> dict[int, Completion]:
        """What the turns have that are being sampled, by their seeds."""
        found: dict[int, Completion] = {}
        if self.resumable:
            sent = dict(self._sent)
            answers = await asyncio.gather(*(self._so_far(request_id, sent[request_id][1]) for request_id in sent))
            for (seed, _), completions in zip(sent.values(), answers, strict=True):
                found |= {seed + member: c for member, c in enumerate(completions) if len(c.tokens)}
        return found

    async def _so_far(self, request_id: str, prompt: int) -> list[Completion]:
        try:
            return await self._policy.so_far(request_id, engine=self._engine, prompt=prompt)
        except EngineError as error:
            logger.info("nothing is kept of request %s: %s", request_id, error)
            return []

    async def first(self, prompt: Sequence[int], sampling: Sampling, *, stop: Sequence[int]) -> Completion:
        """The first turn of a rollout, together with its siblings'.

        It names no session: engines keep what a session computed for its next turn, and most rollouts have none.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Completion] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._send_waiting)
        self._waiting.append(_Request(prompt=prompt, sampling=sampling, stop=stop, answer=answer))
        return await answer

    async def later(
        self, prompt: Sequence[int], sampling: Sampling, *, stop: Sequence[int], session: str, routed: int = 0
    ) -> Completion:
        """A later turn: its prompt extends the tokens of the turn before, which no sibling shares.

        The routes of the first `routed` tokens are known.
        """
        (completion,) = await self._generate(prompt, sampling, stop=stop, session=session, routed=routed)
        return completion

    async def _generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        stop: Sequence[int],
        n: int = 1,
        session: str = "",
        routed: int = 0,
    ) -> list[Completion]:
        request_id = f"gen-{secrets.token_hex(8)}"
        self._sent[request_id] = sampling.seed, len(prompt)
        try:
            return await self._policy.generate(
                prompt,
                sampling,
                stop=stop,
                n=n,
                session=session,
                engine=self._engine,
                routes_from=routed if self._routes else None,
                request_id=request_id,
            )
        finally:
            del self._sent[request_id]

    def _send_waiting(self) -> None:
        """Cut what is waiting into runs of contiguous seeds, one task each."""
        waiting = sorted((r for r in self._waiting if not r.answer.done()), key=lambda r: r.sampling.seed)
        self._waiting.clear()
        runs: list[list[_Request]] = []
        for request in waiting:
            if runs and request.continues(runs[-1][-1]):
                runs[-1].append(request)
            else:
                runs.append([request])
        for run in runs:
            task = self._tasks.create_task(self._answer(run))
            _cancel_when_deserted(task, run)

    async def _answer(self, run: Sequence[_Request]) -> None:
        first = run[0]
        try:
            completions = await self._generate(first.prompt, first.sampling, stop=first.stop, n=len(run))
        except Exception as error:  # belongs to whoever waits; the group's other requests go on
            for request in run:
                if not request.answer.done():
                    request.answer.set_exception(error)
            return
        for request, completion in zip(run, completions, strict=True):
            if not request.answer.done():
                request.answer.set_result(completion)


def _cancel_when_deserted(task: asyncio.Task[None], run: Sequence[_Request]) -> None:
    """A sibling that is cancelled cancels its answer; when all have, the engine need not go on."""

    def check(_: asyncio.Future[Completion]) -> None:
        if all(request.answer.cancelled() for request in run):
            task.cancel()

    for request in run:
        request.answer.add_done_callback(check)
