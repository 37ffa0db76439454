"""One engine: continuous batching as processor sharing.

Every running sequence gains one token per decoding step, and a step takes longer the more sequences run. So the engine
needs one number, `progress`: the tokens a sequence would have gained that had run from the start. A sequence that joins
at progress p with n tokens to go ends at progress p + n, whatever joins or leaves meanwhile; only the time at which
that progress is reached moves. Versions are marks on the same axis. Each event costs O(log n).

Knows nothing of groups, schedulers or steps. Called by the loop, which asks for the time of the next end after every
change and calls back at that time.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from math import floor

import attrs

from prl.simulate.cluster import Cluster
from prl.simulate.workload import RolloutPlan


@attrs.define(eq=False)
class Decoding:
    """A sequence on its engine; `group` says whose it is."""

    group: int
    plan: RolloutPlan
    start: float = -1.0
    """Progress of the engine when it got a slot; -1 while it waits for one."""
    live: bool = True
    """False once it has ended or was aborted."""


class SimulatedEngine:
    """Sequences in slots, and a queue of those that wait for one.

    Example:
        >>> engine = SimulatedEngine(cluster, version=0)  # decode_base 1.0, decode_per_sequence 0.0
        >>> engine.add(0.0, [Decoding(group=0, plan=RolloutPlan(3, 0.0, False))])
        >>> engine.next_end()
        3.0
    """

    def __init__(self, cluster: Cluster, *, version: int) -> None:
        self.busy_seconds = 0.0
        """Time with at least one running sequence."""
        self.slot_seconds = 0.0
        """Running sequences, integrated over time."""
        self.queue_seconds = 0.0
        """Waiting sequences, integrated over time."""
        self.waiting: deque[Decoding] = deque()
        self.running = 0
        self.rollouts = 0
        """Those whose group is placed here and has not ended: what placement goes by."""
        self.ticket = 0
        """Raised by every change: an end that was announced before it is void."""
        self._cluster = cluster
        self._progress = 0.0
        self._now = 0.0
        self._heap: list[tuple[float, int, Decoding]] = []
        self._joined = 0
        self._starts = 0.0
        """Sum of `start` over the running sequences."""
        self._marks = [-1.0]
        self._versions = [version]

    # --- changes ------------------------------------------------------------------------------------------------------
    def add(self, now: float, sequences: Sequence[Decoding]) -> None:
        """Sequences arrive together; those without a slot wait, first in, first out."""
        self._advance(now)
        self.waiting.extend(sequences)
        self._fill()

    def end(self, now: float) -> list[Decoding]:
        """The sequences whose last token comes at `now`, the time that `next_end` gave."""
        self._advance(now)
        self._progress = max(self._progress, self._heap[0][0])  # exactly: no rounding error may leave it just short
        ended = []
        while self._heap and (self._heap[0][0] <= self._progress or not self._heap[0][2].live):
            sequence = heapq.heappop(self._heap)[2]
            if sequence.live:
                sequence.live = False
                self.running -= 1
                self._starts -= sequence.start
                ended.append(sequence)
        self._fill()
        return ended

    def abort(self, now: float, sequences: Sequence[Decoding]) -> int:
        """Take sequences off the engine; the number of tokens they had sampled."""
        self._advance(now)
        tokens = 0
        for sequence in sequences:
            if sequence.live:
                sequence.live = False
                tokens += self._leave(sequence)
        self._fill()
        return tokens

    def commit(self, now: float, version: int) -> None:
        """From the next token on, sequences are sampled by `version`."""
        self._advance(now)
        self._marks.append(self._progress)
        self._versions.append(version)

    # --- questions ----------------------------------------------------------------------------------------------------
    def next_end(self) -> float | None:
        """When the next running sequence ends if nothing changes; None when nothing runs."""
        while self._heap and not self._heap[0][2].live:
            heapq.heappop(self._heap)
        if not self._heap:
            return None
        left = max(0.0, self._heap[0][0] - self._progress)
        return self._now + left * self._cluster.decode_step(self.running)

    def tokens_by_version(self, sequence: Decoding) -> list[tuple[int, int]]:
        """(version, tokens sampled by it) of a sequence that ended, oldest first."""
        index = bisect_right(self._marks, sequence.start) - 1
        runs = []
        counted = 0
        while counted < sequence.plan.tokens:
            last = index + 1 == len(self._marks)
            until = sequence.plan.tokens if last else self._sampled_by(sequence, self._marks[index + 1])
            if until > counted:
                runs.append((self._versions[index], until - counted))
                counted = until
            index += 1
        return runs

    def tokens(self, now: float) -> float:
        """Sampled so far by the sequences that run."""
        self._advance(now)
        return self.running * self._progress - self._starts

    def settle(self, now: float) -> None:
        """Count time up to `now`, at the end of a simulation."""
        self._advance(now)

    # ------------------------------------------------------------------------------------------------------------------
    def _advance(self, now: float) -> None:
        elapsed = now - self._now
        if self.running and elapsed > 0.0:
            self._progress += elapsed / self._cluster.decode_step(self.running)
            self.busy_seconds += elapsed
            self.slot_seconds += elapsed * self.running
            self.queue_seconds += elapsed * len(self.waiting)
        self._now = now
        self.ticket += 1

    def _fill(self) -> None:
        while self.waiting and self.running < self._cluster.slots:
            sequence = self.waiting.popleft()
            sequence.start = self._progress
            heapq.heappush(self._heap, (self._progress + sequence.plan.tokens, self._joined, sequence))
            self._joined += 1
            self.running += 1
            self._starts += sequence.start

    def _leave(self, sequence: Decoding) -> int:
        if sequence.start < 0.0:
            self.waiting.remove(sequence)
            return 0
        self.running -= 1
        self._starts -= sequence.start
        return self._sampled_by(sequence, self._progress)

    @staticmethod
    def _sampled_by(sequence: Decoding, progress: float) -> int:
        """Whole tokens that a sequence has when the engine's progress is `progress`."""
        return max(0, min(sequence.plan.tokens, floor(progress - sequence.start)))
