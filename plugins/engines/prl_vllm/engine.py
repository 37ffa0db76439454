"""The engine as the endpoints see it: requests to vLLM under the version being served, and new versions into vLLM.

    request ──► door ──► vLLM, salted with the weights          closed while weights change: what stands before it is
                  │                                             sent under the new version and finds no old prefix
                  └─► its prompt first to another engine, where the run has some for prompts (`handover.py`)
    prepare ──► every worker fetches and verifies, while it serves
    commit  ──► close door, pause keeping requests, load, mark the version, resume, open door
                a load that fails is undone before anything is resumed; one that cannot be undone ends the engine

At most `sequences` continuations are inside vLLM at one time; the others wait at the door, so that hardly any waits in
vLLM with a salt of a version that is gone. Built by `server.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b

import attrs
import numpy as np
from prl.errors import InfrastructureError
from prl.serve.refusal import RefusedError
from prl.serve.requests import Progress, Request, Result, Stream
from prl.types import Completion, Int32, Manifest, Routes, StopReason

from prl_vllm.api import Answer, Ask, RefusedByVllmError, VllmApi
from prl_vllm.door import Door
from prl_vllm.handover import ONE_TOKEN, TO_BE_FETCHED, Handed, Prefills
from prl_vllm.metrics import named
from prl_vllm.model_files import check
from prl_vllm.segments import in_segments, joined

HANDED = "-handed"
POLL_SECONDS = 0.02
"""Between two looks at a version that is being fetched; each look takes the place of part of a step."""


class Engine:
    """One vLLM server that serves one run's policy."""

    def __init__(
        self,
        api: VllmApi,
        *,
        run_dir: str,
        shapes: dict[str, tuple[int, ...]],
        length: int,
        vocab_size: int,
        sequences: int,
        recompute: bool,
        tells_versions: bool,
        prefills: Prefills | None = None,
    ) -> None:
        self._api = api
        self._run_dir = run_dir
        self._shapes = shapes
        self._recompute = recompute
        self._tells_versions = tells_versions
        self._prefills = prefills
        self._aborted: set[str] = set()
        """Requests that somebody wants to end; only on releases where weight updates abort them too."""
        self._for_others: set[str] = set()
        """Prompts that vLLM computes for other engines."""
        self._door = Door(sequences)
        self._sequences = sequences
        self._staged: Manifest | None = None
        self._mark = ""
        """Of the weights being served: no others ever had it, in no run that shares a disk with this one."""
        self._staging = asyncio.Lock()
        self._changing = asyncio.Lock()
        self._updates = 0
        self._update_seconds = 0.0
        self._paused = False
        self.version = -1
        self.length = length
        self.vocab_size = vocab_size
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails when the engine can serve no version any more."""

    # --- generation ---------------------------------------------------------------------------------------------------
    async def generate(self, request: Request) -> Result:
        """The finished request; cancelling aborts it. Members beyond what vLLM decodes at once follow later."""
        answers = []
        for first in range(0, request.n, self._sequences):
            n = min(self._sequences, request.n - first)
            with _refusals():
                async with self._door.inside(n):
                    answers.append(await self._continue(request, first, n))
        return _result(request, answers)

    async def _continue(self, request: Request, first: int, n: int) -> Answer:
        """`n` continuations, of a prompt that another engine computed, where one did."""
        handed = None if self._prefills is None else await self._fetched(request, first, self._prefills)
        ask = self._ask(request, first, n)
        if handed is None:
            return await self._answer(ask)
        # vLLM computes the last token of a prompt here in any case, and answers no question after it.
        known = len(ask.prompt) - 1 if ask.routes_from is not None else None
        answer = await self._answer(attrs.evolve(ask, salt=_salt(self._mark, handed=True), routes_from=known))
        completions = (
            attrs.evolve(c, routes=joined(_still_of(ask.version, c, handed.routes), c.routes))
            for c in answer.completions
        )
        return attrs.evolve(answer, completions=tuple(completions))

    async def _fetched(self, request: Request, first: int, prefills: Prefills) -> Handed | None:
        """The prompt as another engine computed it, now in vLLM's prefix cache; None where that came to nothing."""
        mark, ask = self._mark, self._ask(attrs.evolve(request, sampling=ONE_TOKEN), first, 1)
        handed = await prefills.compute(ask, mark, session=request.session)
        if handed is not None and mark != self._mark:
            await prefills.give_up(handed)
        elif handed is not None:
            fetching = attrs.evolve(
                ask,
                request_id=f"{ask.request_id}-fetch",
                salt=_salt(mark, handed=True),
                routes_from=None,
                kv_transfer=json.loads(handed.transfer),
            )
            handed = handed if await prefills.within_patience(self._api.generate(fetching)) else None
        await self._door.opened()
        # Nothing is awaited from here until the request is sent: it is of the weights that computed the prompt.
        return handed if mark == self._mark else None

    async def prefill(self, request: Request, mark: str) -> Handed:
        """Compute a prompt and keep it for another engine, under the weights `mark`; RefusedError under all others."""
        with _refusals():
            async with self._door.inside(1):
                answer = None
                if mark == self._mark:
                    ask = attrs.evolve(self._ask(request, 0, 1), kv_transfer=TO_BE_FETCHED)
                    self._for_others.add(ask.request_id)
                    try:
                        answer = await self._api.generate(ask)
                    finally:
                        self._for_others.discard(ask.request_id)
        if answer is None or mark != self._mark or answer.completions[0].stop is StopReason.ABORT:
            if answer is not None and answer.kv_transfer:
                await self.release(answer.kv_transfer["remote_request_id"])
            raise RefusedError(409, f"version {self.version} is served, or about to be, whose weights are others")
        if not answer.kv_transfer:
            raise RefusedError(502, "vLLM keeps no keys and values for others: it has no connector for that")
        completion = answer.completions[0] if self._tells_versions else _marked(answer.completions[0], self.version)
        return Handed(transfer=json.dumps(answer.kv_transfer), routes=completion.routes)

    async def release(self, kept: str) -> None:
        """Keep a prompt no longer for another engine, which has not begun to fetch it."""
        with _refusals():
            await self._api.call("prl_release", requests=[kept])

    async def _answer(self, ask: Ask) -> Answer:
        if self._tells_versions:
            return await self._api.generate(ask)
        try:
            return await in_segments(ask, self._send, self._aborted)
        finally:
            self._aborted.discard(ask.request_id)

    async def _send(self, ask: Ask) -> Answer:
        """Within one version, which is then known; asked again when it is not."""
        while True:
            await self._door.opened()
            version, updates = self.version, self._updates
            salt = _salt(self._mark, handed=ask.salt.endswith(HANDED))
            answer = await self._api.generate(attrs.evolve(ask, salt=salt, version=version))
            changes = self._updates - updates
            if not changes or (changes == 1 and any(c.stop is StopReason.ABORT for c in answer.completions)):
                break  # else it may have waited inside vLLM while weights changed
        return attrs.evolve(answer, completions=tuple(_marked(c, version) for c in answer.completions))

    def _ask(self, request: Request, first: int, n: int) -> Ask:
        sampling = attrs.evolve(request.sampling, seed=request.sampling.seed + first)
        name = request.request_id if first == 0 else f"{request.request_id}-{first}"
        prompt = request.prompt.tolist()
        # The first token decides how long the longest continuation may be: vLLM refuses what does not fit.
        most = min(sampling.max_tokens, self.length - len(prompt))
        return Ask(
            request_id=name,
            prompt=prompt,
            sampling=attrs.evolve(sampling, max_tokens=most, min_tokens=min(sampling.min_tokens, most)),
            n=n,
            stop=request.stop,
            salt=_salt(self._mark),
            version=self.version,
            routes_from=request.routes_from,
        )

    @contextmanager
    def stream(self, request: Request) -> Iterator[Stream]:
        """The request's state as it grows; leaving before there is a result aborts it."""
        stream = Stream()
        task = asyncio.create_task(self._follow(request, stream))
        try:
            yield stream
        finally:
            task.cancel()

    async def _follow(self, request: Request, stream: Stream) -> None:
        """Streams serve people: all members in one request; what came before a failure is what they get."""
        seen = {member: np.empty(0, np.int32) for member in range(request.n)}

        def tell(member: int, tokens: Int32) -> None:
            seen[member] = tokens
            stream.update(Progress(request_id=request.request_id, member=member, tokens=tokens))

        try:
            async with self._door.inside(request.n):
                answer = await self._api.stream(self._ask(request, 0, request.n), tell)
        except InfrastructureError:
            answer = Answer(
                completions=tuple(_cut_short(tokens) for tokens in seen.values()),
                prompt_tokens=len(request.prompt),
                reused_tokens=0,
            )
        stream.update(_result(request, [answer]))

    async def abort(self, request_id: str) -> bool:
        """End a request: whoever waits for it gets the tokens so far."""
        if not self._tells_versions:
            self._aborted.add(request_id)
        await self._api.abort(request_id)
        return True

    async def pause(self) -> None:
        """Compute nothing until `resume`; requests are kept and accepted."""
        async with self._changing:
            await self._api.pause(clear_cache=False)
            self._paused = True

    async def resume(self) -> None:
        async with self._changing:
            await self._api.resume()
            self._paused = False

    # --- weights ------------------------------------------------------------------------------------------------------
    async def prepare(self, manifest: Manifest) -> None:
        """Every worker fetches and verifies a version while the one before it is served."""
        if manifest.version < self.version:
            served = self.version
            raise RefusedError(409, f"version {manifest.version} is older than version {served}, which is served")
        async with self._staging:
            self._staged = None
            try:
                check(manifest, self._shapes)
                await self._fetch(manifest)
            except InfrastructureError as error:
                raise RefusedError(422, f"version {manifest.version} cannot be prepared: {error}") from error
            self._staged = manifest

    async def _fetch(self, manifest: Manifest) -> None:
        await self._api.call("prl_prepare", run_dir=self._run_dir, manifest=attrs.asdict(manifest))
        while True:
            states = await self._api.call("prl_prepared", version=manifest.version)
            for rank, state in enumerate(states):
                if state["error"]:
                    raise InfrastructureError(f"worker {rank}: {state['error']}")
            if all(state["done"] for state in states):
                break
            await asyncio.sleep(POLL_SECONDS)
        await self._api.call("prl_ready", version=manifest.version)  # the states are those of the first copy alone

    async def commit(self, version: int) -> None:
        """Serve a prepared version from the next token on; requests go on. The served version is no change."""
        async with self._changing:
            staged = self._staged
            if staged is None or staged.version != version:
                if self.version == version:
                    return
                known = "no version is prepared" if staged is None else f"version {staged.version} is prepared"
                raise RefusedError(
                    409, f"version {version} was not prepared ({known}, version {self.version} is served)"
                )
            async with self._door.closed():
                started = time.monotonic()
                await self._swap(version, _mark(staged))
                self._update_seconds += time.monotonic() - started

    async def _swap(self, version: int, mark: str) -> None:
        self._staged = None
        await self._api.pause(clear_cache=self._recompute, keep=self._tells_versions)
        for request_id in tuple(self._for_others):  # nobody will use what is left of them
            await self._api.abort(request_id)
        try:
            await self._api.call("prl_commit", version=version)
        except InfrastructureError as error:
            await self._undo(version, error)
        else:
            if self._tells_versions:
                await self._api.set_version(version)
            self.version, self._mark = version, mark
            self._updates += 1
        if not self._paused:
            await self._api.resume()
        if self.version != version:
            raise RefusedError(409, f"version {version} could not be loaded; version {self.version} is served on")

    async def _undo(self, version: int, error: InfrastructureError) -> None:
        """Back to what was served, or the end of this engine: nothing is ever resumed on half of a version."""
        try:
            await self._api.call("prl_restore")
        except InfrastructureError as second:
            broken = InfrastructureError(
                f"version {version} could not be loaded ({error}), and version {self.version} not restored ({second})"
            )
            if not self.broken.done():
                self.broken.set_exception(broken)
            raise RefusedError(500, str(broken)) from second

    async def read_back(self) -> Mapping[str, int]:
        """Name -> checksum of every tensor that the first copy's workers serve; generation waits meanwhile.

        RefusedError where any worker of any copy serves something else than it was sent, and where the first copy's
        serve a tensor in part only.
        """
        async with self._changing, self._door.closed():
            await self._api.pause(clear_cache=False)
            try:
                workers = await self._api.call("prl_read_back", names=[])
            except InfrastructureError as error:
                raise RefusedError(502, str(error)) from error
            finally:
                if not self._paused:
                    await self._api.resume()
        found: dict[str, int] = {}
        elements: Counter[str] = Counter()
        for worker in workers:
            for name, (checksum, held) in worker.items():
                found[name] = checksum
                elements[name] += held
        for name, held in elements.items():
            if held < (whole := math.prod(self._shapes[name])):
                raise RefusedError(502, f"the workers serve {held} of the {whole} elements of tensor {name}")
        return found

    # --- what a person or the controller asks -------------------------------------------------------------------------
    async def statistics(self) -> Mapping[str, float]:
        """Totals since the start; `running` and `waiting` count sequences; nothing was computed in `update_seconds`."""
        statistics = named(await self._api.metrics())
        return {
            **statistics,
            "waiting": statistics["waiting"] + self._door.waiting,
            "handed_tokens": self._prefills.tokens if self._prefills is not None else 0,
            "version": self.version,
            "sequences": self._sequences,
            "length": self.length,
            "paused": int(self._paused),
            "busy_seconds": self._door.busy_seconds,
            "updates": self._updates,
            "update_seconds": self._update_seconds,
        }


def _mark(manifest: Manifest) -> str:
    digest = blake2b(digest_size=8)
    for record in sorted(manifest.tensors, key=lambda record: record.name):
        digest.update(f"{record.name} {record.checksum} ".encode())
    return f"version-{manifest.version}-{digest.hexdigest()}"


def _salt(mark: str, *, handed: bool = False) -> str:
    """Prompts share what was computed for them under the same weights.

    What was computed here is kept apart from what came from elsewhere: only of the former does vLLM know the routes.
    """
    return mark + HANDED if handed else mark


def _marked(completion: Completion, version: int) -> Completion:
    """All of it was computed under one version."""
    routes = completion.routes
    return attrs.evolve(
        completion,
        versions=np.full(len(completion.tokens), version, np.int32),
        routes=routes and attrs.evolve(routes, versions=np.full(len(routes.versions), version, np.int32)),
    )


def _still_of(version: int, completion: Completion, prompt: Routes | None) -> Routes | None:
    """A prompt's routes; of no version that is known where the first token was not sampled under the prompt's."""
    if prompt is None or (len(completion.tokens) and completion.versions[0] == version):
        return prompt
    return attrs.evolve(prompt, versions=np.full(len(prompt.versions), -1, np.int32))


def _cut_short(tokens: Int32) -> Completion:
    """What a stream had when it failed."""
    return Completion(
        tokens=tokens,
        logprobs=np.zeros(len(tokens), np.float32),
        versions=np.full(len(tokens), -1, np.int32),
        stop=StopReason.ABORT,
    )


def _result(request: Request, answers: list[Answer]) -> Result:
    return Result(
        request_id=request.request_id,
        completions=tuple(itertools.chain.from_iterable(answer.completions for answer in answers)),
        prompt_tokens=answers[0].prompt_tokens,
        reused_tokens=answers[0].reused_tokens,
    )


@contextmanager
def _refusals() -> Iterator[None]:
    """What vLLM says no with, in this server's shape."""
    try:
        yield
    except RefusedByVllmError as error:
        raise RefusedError(502, str(error)) from error
    except InfrastructureError as error:
        raise RefusedError(503, str(error)) from error
