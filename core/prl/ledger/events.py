"""What the event log keeps of a run: everything that its controller did not decide, and when it decided what.

    given from outside   Arrived, Dropped (lost in flight), Demonstrated, Trained, Served, Loads: order and columns
    decided              Issued, Arrived.admitted, Dropped (cut, refused), Taken: told so that a replay can be compared

Events are made from the facts that the controller tells the ledger, in their order. A file begins with `Begun` and
`Continued`; the rest follows as it happened. Contents of batches and weights are not kept: they are what a replay
makes, and the ledger has their hashes. Written by `prl.ledger.event_log`, re-enacted by `prl.replay`.
"""

from __future__ import annotations

import functools
import json
from typing import Any, get_args

import attrs

from prl.dispatch.feed import Issue
from prl.ledger import facts
from prl.providers import EngineLoad
from prl.types import Group, Sample


@attrs.frozen(kw_only=True)
class Begun:
    """A launch of the controller."""

    launch: int
    """Its number in the ledger."""
    config: str
    """run.toml of the launch."""
    lock: str
    """plugins.lock of the launch."""


@attrs.frozen(kw_only=True)
class Continued:
    """Everyone has said Hello; the controller's state is this."""

    step: int
    source: str
    """The checkpoint it was read from; empty for a fresh start."""
    state: str
    """JSON: `ControllerState.state_dict()`."""


@attrs.frozen
class Issued:
    """A task of the rl phase is in flight."""

    issue: Issue


@attrs.frozen(kw_only=True)
class Arrived:
    """A group came back; `restored`: it came with the checkpoint."""

    group: Group
    admitted: bool
    restored: bool


@attrs.frozen(kw_only=True)
class Dropped:
    """A group in flight, just arrived or ready will not be trained on.

    `cut`: it was in flight, and the scheduler had said so.
    """

    group_id: int
    reason: str
    again: bool
    cut: bool


@attrs.frozen
class Taken:
    """The groups of the next batch left the ready ones."""

    group_ids: tuple[int, ...]


@attrs.frozen(kw_only=True)
class Demonstrated:
    """The next batch of the warm-up."""

    group_ids: tuple[int, ...]
    samples: tuple[Sample, ...]


@attrs.frozen
class Trained:
    """Every rank has done the step."""

    step: int


@attrs.frozen
class Served:
    """Every serving engine has committed the version."""

    version: int


@attrs.frozen(kw_only=True)
class Loads:
    """The scheduler was told how the engines do."""

    at: float
    loads: tuple[EngineLoad, ...]


@attrs.frozen
class Cut:
    """A checkpoint of the step has the controller's state as it is now."""

    step: int


Event = Begun | Continued | Issued | Arrived | Dropped | Taken | Demonstrated | Trained | Served | Loads | Cut
EVENTS: tuple[type, ...] = get_args(Event)


@functools.singledispatch
def event_of(fact: Any) -> Event | None:
    """What the event log keeps of a fact; None for what plays no part in what is trained."""
    return None


@event_of.register
def _(fact: facts.Continued) -> Continued:
    return Continued(step=fact.step, source=fact.source, state=json.dumps(fact.state))


@event_of.register
def _(fact: facts.Issued) -> Issued | None:
    """A warm-up's tasks are in `Demonstrated`, a restored group in `Arrived`."""
    return Issued(fact.issue) if fact.feed == "rl" and not fact.restored else None


@event_of.register
def _(fact: facts.Arrived) -> Arrived:
    return Arrived(group=fact.group, admitted=fact.admitted, restored=fact.restored)


@event_of.register
def _(fact: facts.Dropped) -> Dropped:
    return Dropped(group_id=fact.group_id, reason=fact.reason, again=fact.again, cut=fact.cut)


@event_of.register
def _(fact: facts.Taken) -> Taken:
    return Taken(fact.group_ids)


@event_of.register
def _(fact: facts.Demonstrated) -> Demonstrated:
    return Demonstrated(group_ids=fact.group_ids, samples=fact.samples)


@event_of.register
def _(fact: facts.Trained) -> Trained:
    return Trained(fact.step)


@event_of.register
def _(fact: facts.Served) -> Served:
    return Served(fact.version)


@event_of.register
def _(fact: facts.Loads) -> Loads:
    return Loads(at=fact.at, loads=fact.loads)


@event_of.register
def _(fact: facts.Cut) -> Cut:
    return Cut(fact.step)


# --- in words ---------------------------------------------------------------------------------------------------------
def sentence(event: Event) -> str:
    """What happened, without its columns: two events that say the same are the same decision."""
    match event:
        case Issued(issue):
            where = f"{issue.task.environment} task {issue.task.index}"
            return f"group {issue.group_id} is issued: {where}, attempt {issue.attempt}"
        case Arrived(group=group):
            verdict = "admitted" if event.admitted else "refused"
            return f"group {group.group_id} arrives{' with the checkpoint' if event.restored else ''} and is {verdict}"
        case Dropped():
            then = "issued again" if event.again else "given up"
            how = "is cut in flight" if event.cut else "is dropped"
            return f"group {event.group_id} {how} ({event.reason}) and {then}"
        case Taken(group_ids):
            return f"groups {', '.join(map(str, group_ids))} form the next batch"
        case Demonstrated():
            return f"demonstrations {', '.join(map(str, event.group_ids))} form the next batch"
        case Trained(step):
            return f"step {step} is trained"
        case Served(version):
            return f"version {version} is served"
        case Loads(loads=loads):
            return f"the scheduler is told how {len(loads)} engines do"
        case Cut(step):
            return f"a checkpoint of step {step} begins"
        case _:
            return f"a launch {type(event).__name__.lower()}"
