"""What an environment holds: a conversation with the policy that keeps its own record, token by token.

    ask(opening messages) -> tokens of the prompt   | sampled turn |                          -> reply
    ask(next messages)    ->                        |   as it is   | extension | sampled turn -> reply

A later turn extends the token ids of the one before it: what was sampled is never decoded and encoded again, and the
work of a turn is proportional to its new tokens. Knows no task and no reward. The group runner builds one per rollout
and hands it to `Env.rollout` and `Env.score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from random import Random
from typing import Any, NoReturn

import attrs
import numpy as np

from prl.errors import UserError
from prl.providers import Renderer, Score
from prl.rollout.carried import CarriedRollout, continued, sampled_until
from prl.rollout.policy import Siblings
from prl.routes import RouteRecord
from prl.types import Completion, Message, Rollout, Sampling, StopReason, Turn, as_tokens

_SEED_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: turns of one rollout and seeds of siblings stay far apart
_SEEDS = 1 << 63


@attrs.frozen(kw_only=True, eq=False)
class _Asked:
    """A turn that is being sampled."""

    prompt: Sequence[int]
    seed: int
    begun: Completion | None
    """Its first tokens, where they were sampled before the run was resumed."""

    def so_far(self, rest: Completion | None) -> Completion | None:
        if rest is None or self.begun is None:
            return rest or self.begun
        return continued(self.begun, rest)


class ConversationOver(BaseException):
    """The conversation has no room left. `Env.rollout` need not catch it: the rollout ends there and is scored.

    Like asyncio.CancelledError it is no Exception, so that an environment's `except Exception` does not swallow it.
    """


class Opening:
    """The tokens of the messages that open a group's conversations, rendered once where siblings agree."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._messages: tuple[Message, ...] = ()
        self._tokens: list[int] = []

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of the opening; the caller must not change the list."""
        if not self._tokens or tuple(messages) != self._messages:
            self._messages, self._tokens = tuple(messages), self._renderer.start(messages)
        return self._tokens


class Conversation:
    """One rollout in the making.

    Example:
        >>> async def rollout(self, task, conversation):
        ...     reply = await conversation.ask(task.messages)
        ...     while not solved(reply["content"]):
        ...         reply = await conversation.ask([{"role": "user", "content": "Try again."}])

    The loop needs no check for length: when a turn no longer fits `rollouts.sequence_length`, `ask` raises
    `ConversationOver`, which ends the rollout as truncated, and it is scored for what it is.
    """

    def __init__(
        self,
        *,
        rollout_id: str,
        renderer: Renderer,
        siblings: Siblings,
        opening: Opening,
        sampling: Sampling,
        sequence_length: int,
        carried: CarriedRollout | None = None,
    ) -> None:
        self.rollout_id = rollout_id
        self.messages: list[Message] = []
        """Everything said so far, the policy's replies included."""
        self.turns: list[Turn] = []
        """The policy's turns; a last one without tokens says that there was no room for it."""
        self.state: dict[str, Any] = {}
        """Free for the environment, to remember between `rollout` and `score`."""
        self.seed = sampling.seed
        """Differs between siblings; the same when the same rollout is repeated."""
        self._renderer = renderer
        self._siblings = siblings
        self._opening = opening
        self._sampling = sampling
        self._sequence_length = sequence_length
        self._tokens: list[int] = []
        self._completions: list[Completion] = []
        self.routes = RouteRecord()
        """Which experts its tokens were sent to, where the run replays that."""
        self._asking = False
        self._no_room = False
        self._carried = carried
        """What was said before the run was resumed, as long as it is said again."""
        self._asked: _Asked | None = None

    @cached_property
    def rng(self) -> Random:
        """Random numbers of this rollout, seeded with `seed`."""
        return Random(self.seed)

    @property
    def over(self) -> bool:
        """`rollouts.sequence_length` is reached: nothing more can be asked."""
        return self._no_room or len(self._tokens) >= self._sequence_length

    @property
    def truncated(self) -> bool:
        """The last turn was cut by a limit."""
        return bool(self.turns) and self.turns[-1].stop is StopReason.LENGTH

    @property
    def reply(self) -> str:
        """What the policy said last; empty when it has not spoken."""
        return next((str(m.get("content") or "") for m in reversed(self.messages) if m["role"] == "assistant"), "")

    async def ask(self, messages: Sequence[Message]) -> Message:
        """Say `messages`, let the policy speak, and return what it said.

        The first call opens the conversation, the next ones extend it. A turn ends at a stop token, or is cut at
        `rollouts.max_tokens` or `rollouts.sequence_length`. ConversationOver when the new messages leave no room to
        reply; UserError when even the opening does not; EngineError when the engine cannot answer.
        """
        if self._asking:
            raise RuntimeError(f"rollout {self.rollout_id}: ask was called while another ask was waiting for its reply")
        self._asking = True
        try:
            completion = await (self._continue(messages) if self.turns else self._open(messages))
        finally:
            self._asking = False
        return self._take(completion, messages)

    async def _open(self, messages: Sequence[Message]) -> Completion:
        prompt = self._opening.tokens(messages)
        room = self._sequence_length - len(prompt)
        if room < 1:
            raise UserError(
                f"the opening messages take {len(prompt)} tokens, which leaves no room for a reply within "
                f"rollouts.sequence_length = {self._sequence_length}; raise it or shorten the task"
            )
        completion = await self._sample(prompt, self._turn_sampling(room))
        self._tokens = list(prompt)
        return completion

    async def _continue(self, messages: Sequence[Message]) -> Completion:
        length = len(self._tokens)
        extension = self._renderer.extend(messages, stopped=self.turns[-1].stop is StopReason.STOP)
        room = self._sequence_length - length - len(extension)
        if self.over or room < 1:
            self._end()
        self._tokens += extension
        try:
            return await self._sample(self._tokens, self._turn_sampling(room))
        except BaseException:  # the turn did not happen: an environment that survives this may ask again
            del self._tokens[length:]
            raise

    async def _sample(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        """The turn after `prompt`, or what is left of it to be sampled."""
        begun = self._recall(prompt, sampling)
        if begun is not None and begun.stop is not StopReason.ABORT:
            return begun
        self._asked = _Asked(prompt=prompt, seed=sampling.seed, begun=begun)
        stop = self._renderer.stop_tokens
        try:
            if begun is not None:
                return continued(begun, await self._rest(prompt, sampling, begun))
            if not self.turns:
                return await self._siblings.first(prompt, sampling, stop=stop)
            return await self._siblings.later(
                prompt, sampling, stop=stop, session=self.rollout_id, routed=self.routes.known
            )
        finally:
            self._asked = None

    def _recall(self, prompt: Sequence[int], sampling: Sampling) -> Completion | None:
        """What a checkpoint has of this turn; once a turn differs, later ones are not looked for."""
        recalled = self._carried.turn(len(self.turns), prompt) if self._carried else None
        if recalled is None or len(recalled.tokens) > sampling.max_tokens - (recalled.stop is StopReason.ABORT):
            self._carried = None
            return None
        return recalled

    async def _rest(self, prompt: Sequence[int], sampling: Sampling, begun: Completion) -> Completion:
        """An engine that resumes draws by seed and place, so these are the tokens it would have sampled then."""
        count = len(begun.tokens)
        routes = begun.routes
        left = attrs.evolve(
            sampling, max_tokens=sampling.max_tokens - count, min_tokens=max(0, sampling.min_tokens - count)
        )
        return await self._siblings.later(
            [*prompt, *begun.tokens.tolist()],
            left,
            stop=self._renderer.stop_tokens,
            session=self.rollout_id if self.turns else "",
            routed=routes.start + len(routes.versions) if routes else self.routes.known,
        )

    def _end(self) -> NoReturn:
        self._no_room = True
        if not self.truncated:
            end = len(self._tokens)
            self.turns.append(Turn(start=end, end=end, stop=StopReason.LENGTH))
        raise ConversationOver(f"rollout {self.rollout_id} has no room within {self._sequence_length} tokens")

    def _turn_sampling(self, room: int) -> Sampling:
        """Turns draw from unrelated seeds; the first from the rollout's own, contiguous with its siblings'."""
        limit = min(self._sampling.max_tokens, room)
        return attrs.evolve(
            self._sampling,
            max_tokens=limit,
            min_tokens=min(self._sampling.min_tokens, limit),
            seed=(self.seed + _SEED_STRIDE * len(self.turns)) % _SEEDS if self.turns else self.seed,
        )

    def _take(self, completion: Completion, messages: Sequence[Message]) -> Message:
        start = len(self._tokens)
        self._tokens += completion.tokens.tolist()
        self._completions.append(completion)
        self.routes.add(completion.routes)
        self.turns.append(Turn(start=start, end=len(self._tokens), stop=completion.stop))
        reply = self._renderer.parse(self._tokens[start:])
        self.messages += (*messages, reply)
        return reply

    @property
    def asked_seed(self) -> int:
        """The seed of the turn that is being sampled; -1, which is no seed, when none is."""
        return self._asked.seed if self._asked else -1

    def kept(self, version: int, so_far: Completion | None) -> CarriedRollout | None:
        """What versions up to `version` have sampled of it; `so_far` is what the engine has of the turn it is asked."""
        turns = [
            (self._tokens[: turn.start], completion)
            for turn, completion in zip(self.turns, self._completions, strict=False)
        ]
        if self._asked is not None and (partial := self._asked.so_far(so_far)) is not None:
            turns.append((list(self._asked.prompt), partial))
        kept: list[tuple[list[int], Completion]] = []
        for prompt, whole in turns:
            completion = sampled_until(whole, version, prompt=len(prompt))
            if completion is not None and (completion.stop is not StopReason.ABORT or self._siblings.resumable):
                kept.append((prompt, completion))
            if completion is not whole:
                break
        if not kept:
            return None
        prompt, last = kept[-1]
        return CarriedRollout(
            member=int(self.rollout_id.rpartition(".")[2]),
            tokens=np.concatenate([as_tokens(prompt), last.tokens]),
            starts=tuple(len(prompt) for prompt, _ in kept),
            completions=tuple(completion for _, completion in kept),
        )

    def record(self, score: Score) -> Rollout:
        """The finished conversation; every column is `[L]`, exactly as sampled."""
        length = len(self._tokens)
        sampled = np.zeros(length, dtype=np.bool_)
        logprobs = np.zeros(length, dtype=np.float32)
        versions = np.full(length, -1, dtype=np.int32)
        for turn, completion in zip(self.turns, self._completions, strict=False):
            sampled[turn.start : turn.end] = True
            logprobs[turn.start : turn.end] = completion.logprobs
            versions[turn.start : turn.end] = completion.versions
        return Rollout(
            rollout_id=self.rollout_id,
            tokens=as_tokens(self._tokens),
            sampled=sampled,
            logprobs=logprobs,
            versions=versions,
            temperature=self._sampling.temperature,
            turns=tuple(self.turns),
            messages=tuple(self.messages),
            reward=score.reward,
            metrics=score.metrics,
        )
