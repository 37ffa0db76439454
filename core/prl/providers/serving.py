"""What generates: inference engines, and how weights reach them. See `prl.providers`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import attrs

from prl.providers.provider import Provider, Ref

if TYPE_CHECKING:
    from torch import Tensor

    from prl.types import Completion, Manifest, Sampling


@attrs.frozen(kw_only=True)
class Engine(Provider):
    """An inference engine: a server process and the client the others talk to it with."""

    serve: Ref
    """engine process: `async (EngineContext) -> None`; runs until cancelled. See `prl.weights.engines`."""
    connect: Ref
    """environment workers and controller: `(url, token) -> EngineClient`"""
    join: Ref = ""
    """engine-part process, for engines that span nodes (`EngineConfig.spans`): `async (EngineContext) -> None`"""
    reports_routes: bool = False
    """It can say which experts tokens were sent to (`routes_from`)."""
    resumable: bool = False
    """Its client is a `ResumableClient`, and a turn that was cut short is gone on with as if it had not been: what a
    token is drawn with depends on the request's seed and the token's place in the sequence alone."""


class EngineClient(Protocol):
    """Async client of one engine. Every method raises InfrastructureError when the engine cannot answer."""

    async def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        stop: Sequence[int],
        n: int = 1,
        session: str = "",
        routes_from: int | None = None,
    ) -> list[Completion]:
        """`n` continuations of prompt; `session` lets a later turn find its cache. Cancelling the task aborts it.

        With `routes_from` each says which experts its tokens were sent to, from that token of the prompt on. Rows may
        be missing: what is not known is not replayed.
        """

    async def prepare(self, manifest: Manifest) -> None:
        """Fetch and verify a version beside the one being served."""

    async def commit(self, version: int) -> None:
        """Pause between two tokens, swap to a prepared version, resume with every request kept. Idempotent."""

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def statistics(self) -> Mapping[str, float]:
        """Names of `prl.serve.metrics`: at least `version`, `generated_tokens`, `busy_seconds` and `EngineLoad`'s."""

    async def aclose(self) -> None: ...


class ResumableClient(EngineClient, Protocol):
    """A client that can say what an engine has of a request before it is answered."""

    async def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        stop: Sequence[int],
        n: int = 1,
        session: str = "",
        routes_from: int | None = None,
        request_id: str = "",
    ) -> list[Completion]:
        """As that of any engine, under a name of the caller's."""

    async def so_far(self, request_id: str) -> list[Completion]:
        """The tokens of each member by now, ABORT their stop reason where they are not all; the request goes on.

        Nothing when there is no such request.
        """


@attrs.frozen(kw_only=True)
class WeightTransport(Provider):
    """How the bytes of a version travel from trainer to engine."""

    send: Ref
    """trainer: `(config, run_dir: Path, rank: int) -> WeightSender`; every rank has one and sends tensors of its own"""
    receive: Ref
    """engine: `(config, run_dir: Path) -> WeightReceiver`"""


class WeightSender(Protocol):
    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Manifest:
        """Write every tensor of this rank once; when it returns, any engine can fetch them. The part's manifest."""

    def retire(self, version: int) -> None:
        """No engine will ask for this version again: free it. Idempotent."""

    def close(self) -> None: ...


class WeightReceiver(Protocol):
    def fetch(self, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of every part, verified; InfrastructureError names the tensor whose checksum differs.

        A manifest may lack tensors that were sent (`Manifest.only`): no byte of theirs need be read or moved. Each
        comes where the transport has it, in host memory or on this thread's device. Whoever wants it elsewhere copies
        it, and does so before taking the next, for all of them may not fit there.
        """

    def close(self) -> None: ...
