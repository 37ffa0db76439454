"""A request becomes a group: siblings roll out side by side, are scored together and recorded.

Knows tasks, environments and the engine a group was sent to, nothing about processes: environment workers run it behind
a connection, the controller runs it in process for environments that are cheap. A rollout that breaks is a `Failure` of
its own and never harms a sibling; cancelling `run` cancels everything below it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import traceback
from collections.abc import Awaitable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import attrs
import numpy as np

from prl.columns import ColumnFolder
from prl.compose.compose import Composition
from prl.compose.config import Run
from prl.compose.routing import replayed
from prl.errors import CheckpointError, InfrastructureError, PrlError, UserError
from prl.messages import RunGroup
from prl.providers import Engine, Env, Environment, Model, Renderer, Score
from prl.rollout import carried
from prl.rollout.carried import CarriedGroup, CarriedRollout
from prl.rollout.conversation import Conversation, ConversationOver, Opening
from prl.rollout.policy import EngineError, Policy, Siblings
from prl.rollout.tokenizer import load
from prl.routes import store
from prl.types import Carried, Completion, Failure, Group, Rollout, Sample, Split, Task, TaskRef, as_tokens

logger = logging.getLogger(__name__)
SPLITS: tuple[Split, ...] = ("train", "eval")


def environment_names(composition: Composition, *, cheap: bool) -> tuple[str, ...]:
    """Names of the environments that run in the controller (`cheap`) or in environment workers."""
    providers = [(section.name, composition.provider(section)) for section in composition.run.environments]
    return tuple(name for name, p in providers if isinstance(p, Environment) and p.cheap is cheap)


class GroupRunner:
    """The environments of one process, and the policy they talk to. Large columns go to the folder `columns`.

    Example:
        >>> runner = GroupRunner(composition, run, token, columns=run_dir.columns, environments=["guessing"])
        >>> group = await runner.run(request)
        >>> group.rewards
        (1.0, 0.0, 0.8, 1.0)
        >>> await runner.aclose()
    """

    def __init__(
        self, composition: Composition, run: Run, token: str, *, columns: Path, environments: Collection[str]
    ) -> None:
        self._rollouts = run.rollouts
        self._in_flight: dict[tuple[int, int], _InFlight] = {}
        """By group id and attempt."""
        self._columns = ColumnFolder(columns)
        self._renderer = _renderer(composition, run)
        self._policy = _policy(composition, run, token)
        self._environments: dict[str, Env] = {
            section.name: composition.build(section, run.run.seed)
            for section in run.environments
            if section.name in environments
        }

    def sizes(self) -> dict[str, int]:
        """`{"<environment>/<split>": number of tasks}`."""
        return {f"{name}/{split}": env.size(split) for name, env in self._environments.items() for split in SPLITS}

    async def run(self, request: RunGroup) -> Group:
        """Roll out, score and record the siblings of one task.

        Raises only when there is no such task or its statement cannot be made; anything later is a `Failure` of the
        rollouts it concerns.
        """
        env, task = self._task(request.task)
        try:
            conversations, failures = await self._converse(env, task, request)
            rollouts, unscored = await _score(env, task, conversations)
            rollouts = await self._with_routes(rollouts, conversations, request)
        finally:
            self._in_flight.pop((request.group_id, request.attempt), None)
        return Group(
            group_id=request.group_id,
            task=request.task,
            attempt=request.attempt,
            started_version=request.version,
            rollouts=tuple(rollouts),
            failures=(*failures, *unscored),
        )

    async def demonstrate(self, tasks: Sequence[TaskRef]) -> tuple[Sample, ...]:
        """Solved conversations as samples of the ce stream; UserError names an environment that has none."""
        samples = []
        for ref in tasks:
            samples.append(self._demonstration(ref))
            await asyncio.sleep(0)
        return tuple(samples)

    async def keep_in_flight(self, path: Path, version: int) -> tuple[Carried, ...]:
        """Write what versions up to `version` have sampled of the groups that are being rolled out into a new file."""
        groups = dict(self._in_flight)
        partial = await asyncio.gather(*(group.siblings.so_far() for group in groups.values()))
        kept = [
            (*names, group.kept(version, so_far))
            for (names, group), so_far in zip(groups.items(), partial, strict=True)
        ]
        found = [(group_id, attempt, group) for group_id, attempt, group in kept if group.rollouts]
        return await asyncio.to_thread(carried.write, path, found) if found else ()

    async def aclose(self) -> None:
        """Close every environment and client, even when one of them fails to."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._policy.aclose)
            for env in self._environments.values():
                stack.push_async_callback(env.aclose)

    def _task(self, ref: TaskRef) -> tuple[Env, Task]:
        env = self._environments.get(ref.environment)
        if env is None:
            known = ", ".join(map(repr, self._environments)) or "none"
            raise UserError(f"no environment {ref.environment!r} in this process; it has {known}")
        size = env.size(ref.split)
        if not 0 <= ref.index < size:
            raise UserError(
                f"environment {ref.environment!r} has {size} {ref.split} tasks, none with index {ref.index}"
            )
        return env, env.task(ref.split, ref.index)

    async def _converse(self, env: Env, task: Task, request: RunGroup) -> tuple[list[Conversation], list[Failure]]:
        """The siblings' conversations that came to their end, and the failures of the others."""
        kept = await _carried(request)
        async with asyncio.TaskGroup() as tasks:
            routes = self._policy.routing is not None and request.task.split == "train"
            siblings = Siblings(self._policy, engine=request.engine, tasks=tasks, routes=routes)
            opening = Opening(self._renderer)
            conversations = [
                Conversation(
                    rollout_id=f"{request.group_id}.{member}",
                    renderer=self._renderer,
                    siblings=siblings,
                    opening=opening,
                    sampling=attrs.evolve(request.sampling, seed=request.sampling.seed + member),
                    sequence_length=self._rollouts.sequence_length,
                    carried=kept.get(member),
                )
                for member in range(request.size)
            ]
            if request.task.split == "train":
                names = request.group_id, request.attempt
                self._in_flight[names] = _InFlight(request, siblings, conversations)
            holding = [tasks.create_task(_hold(env, task, conversation)) for conversation in conversations]
        outcomes = [_outcome(c, h) for c, h in zip(conversations, holding, strict=True)]
        finished = [c for c, outcome in zip(conversations, outcomes, strict=True) if outcome is None]
        return finished, [outcome for outcome in outcomes if outcome is not None]

    async def _with_routes(
        self, rollouts: Sequence[Rollout], conversations: Sequence[Conversation], request: RunGroup
    ) -> list[Rollout]:
        """The rollouts with references to their routes, which are written to disk beside the event loop."""
        records = {conversation.rollout_id: conversation.routes for conversation in conversations}

        def write(rollout: Rollout) -> Rollout:
            columns = records[rollout.rollout_id].columns(len(rollout.tokens))
            opening = rollout.turns[0].start
            names = {"group_id": request.group_id, "attempt": request.attempt}
            return attrs.evolve(rollout, large=store(columns, self._columns, opening=opening, **names))

        routed = any(record.turns for record in records.values())
        return await asyncio.to_thread(lambda: list(map(write, rollouts))) if routed else list(rollouts)

    def _demonstration(self, ref: TaskRef) -> Sample:
        env, task = self._task(ref)
        messages = env.demonstration(task)
        if messages is None:
            raise UserError(
                f"environment {ref.environment!r} has no demonstration of {ref.split} task {ref.index}, which the "
                "warm-up needs; set warmup.steps = 0 or its weight to 0"
            )
        tokens, said = self._renderer.demonstration(messages)
        limit = self._rollouts.sequence_length
        if len(tokens) > limit:
            raise UserError(
                f"the demonstration of {ref.split} task {ref.index} of environment {ref.environment!r} takes "
                f"{len(tokens)} tokens, more than rollouts.sequence_length = {limit}"
            )
        return _ce_sample(tokens, said)


def _renderer(composition: Composition, run: Run) -> Renderer:
    model = composition.provider(run.model)
    assert isinstance(model, Model)
    renderer: Renderer = composition.load(model.render)(run.model, load(run.tokenizer, model.special_tokens))
    return renderer


def _policy(composition: Composition, run: Run, token: str) -> Policy:
    engine = composition.provider(run.engine)
    assert isinstance(engine, Engine)
    connect = composition.load(engine.connect)
    return Policy(connect, token, routing=replayed(composition), resumable=engine.resumable)


# --- a group in flight ------------------------------------------------------------------------------------------------
@attrs.frozen
class _InFlight:
    request: RunGroup
    siblings: Siblings
    conversations: Sequence[Conversation]

    def kept(self, version: int, so_far: Mapping[int, Completion]) -> CarriedGroup:
        """`so_far`: what the engine has of the turns that it is asked, by their seeds."""
        rollouts = [c.kept(version, so_far.get(c.asked_seed)) for c in self.conversations]
        return CarriedGroup(sampling=self.request.sampling, rollouts=tuple(r for r in rollouts if r is not None))


async def _carried(request: RunGroup) -> dict[int, CarriedRollout]:
    """What a checkpoint has of the group's members; nothing where it was sampled otherwise, or is not there."""
    if request.carried is None:
        return {}
    try:
        group = await asyncio.to_thread(carried.read, request.carried)
    except CheckpointError as error:
        logger.warning("group %d begins anew: %s", request.group_id, error)
        return {}
    return {r.member: r for r in group.rollouts} if group.sampling == request.sampling else {}


# --- one rollout ------------------------------------------------------------------------------------------------------
async def _hold(env: Env, task: Task, conversation: Conversation) -> Failure | None:
    """Hold one conversation to its end; None when it can be scored."""
    try:
        await _until_over(env.rollout(task, conversation))
    except Exception as error:  # whatever an environment raises is its rollout's alone
        return _failure(conversation, error)
    if not conversation.turns:
        return Failure(
            rollout_id=conversation.rollout_id,
            where="environment",
            error="the rollout ended before the policy was asked anything",
        )
    return None


async def _until_over(rollout: Awaitable[None]) -> None:
    """A conversation without room ends its rollout, also from inside an environment's own TaskGroup."""
    try:
        await rollout
    except* ConversationOver:
        pass


def _outcome(conversation: Conversation, holding: asyncio.Task[Failure | None]) -> Failure | None:
    if holding.cancelled():  # not by us: the TaskGroup would have raised
        error = "the environment cancelled its own rollout"
        return Failure(rollout_id=conversation.rollout_id, where="environment", error=error)
    return holding.result()


def _failure(conversation: Conversation, error: Exception) -> Failure:
    while isinstance(error, ExceptionGroup):  # an environment with a TaskGroup of its own
        error = error.exceptions[0]
    where = "engine" if isinstance(error, EngineError) else "environment"
    return Failure(rollout_id=conversation.rollout_id, where=where, error=describe(error))


def describe(error: BaseException) -> str:
    """A sentence about an error: what was foreseen says it itself, of the rest the place is named and logged."""
    if isinstance(error, PrlError):
        return str(error)
    logger.warning("unforeseen in a rollout", exc_info=error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


# --- a group's scores -------------------------------------------------------------------------------------------------
async def _score(env: Env, task: Task, conversations: Sequence[Conversation]) -> tuple[list[Rollout], list[Failure]]:
    """Rollouts of the conversations whose score is a number; a scorer that breaks fails them all."""
    if not conversations:
        return [], []
    try:
        scores = await env.score(task, conversations)
        if len(scores) != len(conversations):
            raise InfrastructureError(f"score returned {len(scores)} scores for {len(conversations)} conversations")
    except Exception as error:  # an environment may raise anything, and a broken scorer says nothing about the policy
        return [], [_failure(conversation, error) for conversation in conversations]
    rollouts: list[Rollout] = []
    failures: list[Failure] = []
    for conversation, score in zip(conversations, scores, strict=True):
        try:
            rollouts.append(conversation.record(_finite(score)))
        except (InfrastructureError, TypeError, ValueError) as error:
            failures.append(_failure(conversation, error))
    return rollouts, failures


def _finite(score: Score) -> Score:
    """The score as plain floats; InfrastructureError when one of them is no finite number."""
    metrics = {name: _number(name, value) for name, value in score.metrics.items()}
    return Score(reward=_number("reward", score.reward), metrics=metrics)


def _number(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise InfrastructureError(f"the environment scored {name} = {value}; it must be a finite number")
    return float(value)


# --- demonstrations ---------------------------------------------------------------------------------------------------
def _ce_sample(tokens: Sequence[int], said: Sequence[bool]) -> Sample:
    """A demonstration: nothing of it was sampled, and the ce stream is what the assistant says."""
    length = len(tokens)
    return Sample(
        tokens=as_tokens(tokens),
        sampled=np.zeros(length, dtype=np.bool_),
        engine_logprobs=np.zeros(length, dtype=np.float32),
        versions=np.full(length, -1, dtype=np.int32),
        advantages=np.zeros(length, dtype=np.float32),
        temperature=1.0,
        weights={"ce": np.asarray(said, dtype=np.float32)},
    )
