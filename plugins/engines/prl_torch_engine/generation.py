"""The model's thread, and the way into it from the server's event loop.

    event loop ── actions (deque) ──► model's thread: actions, then one step, then actions, ...
               ◄── results, once per step, only when there are any ──

Every change of state (a new request, an abort, new weights) is an action that runs between two steps, so the scheduler
needs no lock. With nothing to do, or while paused, the thread waits for an action. Called by `server.py`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from prl.serve.refusal import RefusedError
from prl.serve.requests import Progress, Request, Result, Stream

from prl_torch_engine.scheduler import Scheduler

T = TypeVar("T")

MAX_REQUESTS = 4096
"""Requests in the engine at one time; more are refused."""


class Generation:
    """Runs a scheduler. All methods but `run` belong to the event loop."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._actions: deque[Callable[[], object]] = deque()
        self._wake = threading.Condition()
        self._paused = False
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        self._futures: dict[str, asyncio.Future[Result]] = {}
        self._streams: dict[str, Stream] = {}
        self.busy_seconds = 0.0

    # --- the model's thread ---------------------------------------------------------------------------------------
    def run(self) -> None:
        """Step until `stop`; an exception of the model ends the engine."""
        # A default device costs every call into torch a little, and on a CPU changes nothing.
        device = self._scheduler.rows.tokens.device
        if device.type != "cpu":
            torch.set_default_device(device)
        with torch.inference_mode():
            while not self._stopping:
                for action in self._next_actions():
                    action()
                if self._scheduler.busy and not self._paused:
                    started = time.perf_counter()
                    self._scheduler.step()
                    self.busy_seconds += time.perf_counter() - started
                self._hand_over(*self._scheduler.take())

    def _next_actions(self) -> list[Callable[[], object]]:
        """Actions that came since the last step; waits for one when there is nothing to compute."""
        with self._wake:
            while not self._actions and not self._stopping and (self._paused or not self._scheduler.busy):
                self._wake.wait()
            actions = list(self._actions)
            self._actions.clear()
        return actions

    def _hand_over(self, results: Sequence[Result], progress: Sequence[Progress]) -> None:
        if results or progress:
            self._loop.call_soon_threadsafe(self._deliver, results, progress)

    # --- the event loop -------------------------------------------------------------------------------------------
    def _post(self, action: Callable[[], object]) -> None:
        with self._wake:
            self._actions.append(action)
            self._wake.notify()

    def _deliver(self, results: Sequence[Result], progress: Sequence[Progress]) -> None:
        for entry in progress:
            if stream := self._streams.get(entry.request_id):
                stream.update(entry)
        for result in results:
            if stream := self._streams.get(result.request_id):
                stream.update(result)
            future = self._futures.get(result.request_id)
            if future is not None and not future.done():
                future.set_result(result)

    async def generate(self, request: Request) -> Result:
        """The finished request; cancelling aborts it. RefusedError when there are too many."""
        future: asyncio.Future[Result] = self._loop.create_future()
        self._accept(request, self._futures, future)
        try:
            return await future
        finally:
            self._forget(request, self._futures, finished=future.done() and not future.cancelled())

    @contextmanager
    def stream(self, request: Request) -> Iterator[Stream]:
        """The request's state as it grows; leaving before there is a result aborts it."""
        stream = self._accept(request, self._streams, Stream())
        try:
            yield stream
        finally:
            self._forget(request, self._streams, finished=stream.result is not None)

    def _accept(self, request: Request, table: dict[str, T], entry: T) -> T:
        if len(self._futures) + len(self._streams) >= MAX_REQUESTS:
            raise RefusedError(503, f"the engine already holds {MAX_REQUESTS} requests; try again later")
        if request.request_id in self._futures or request.request_id in self._streams:
            raise RefusedError(409, f"request_id {request.request_id!r} is in use by another request")
        table[request.request_id] = entry
        self._post(lambda: self._scheduler.add(request))
        return entry

    def _forget(self, request: Request, table: dict[str, Any], *, finished: bool) -> None:
        del table[request.request_id]
        if not finished:
            self._post(lambda: self._scheduler.abort(request.request_id))

    async def between_steps(self, action: Callable[[], T]) -> T:
        """Run `action` in the model's thread between two steps; its value or exception comes back."""
        done: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                value = action()
            except Exception as error:  # belongs to whoever asked for the action, not to the model's thread
                self._loop.call_soon_threadsafe(_settle, done, None, error)
            else:
                self._loop.call_soon_threadsafe(_settle, done, value, None)

        self._post(run)
        return await done

    async def abort(self, request_id: str) -> bool:
        """End a request: whoever waits for it gets the tokens so far. False when there is no such request."""
        return await self.between_steps(lambda: self._scheduler.abort(request_id))

    async def so_far(self, request_id: str) -> Result:
        """What a request has by now; without completions when there is no such request."""
        return await self.between_steps(lambda: self._scheduler.so_far(request_id))

    async def pause(self) -> None:
        """Compute nothing until `resume`; requests are kept and accepted."""
        await self.between_steps(lambda: self._set_paused(True))

    async def resume(self) -> None:
        await self.between_steps(lambda: self._set_paused(False))

    def _set_paused(self, paused: bool) -> None:
        self._paused = paused

    @property
    def paused(self) -> bool:
        return self._paused

    def stop(self) -> None:
        """Let `run` return after the step it is in."""
        with self._wake:
            self._stopping = True
            self._wake.notify()


def _settle(future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
