"""Histories of runs, written fact by fact: what a controller would have told the ledger, without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
from prl.dispatch.feed import Feed, Issue, Source
from prl.ledger import facts
from prl.ledger.store import Store
from prl.score.credit import score
from prl.score.pack import pack
from prl.types import Batch, Failure, Group, Manifest, Sample, TensorRecord

from tests.dispatch.fakes import demonstration, rollout

GROUPS, MEMBERS, SAMPLES, TASKS, BOUND = 2, 3, 3, 7, 1


def feed(seed: int, retries: int = 1) -> Feed:
    return Feed([Source(environment="toy", weight=1.0, size=TASKS)], seed=seed, retries=retries)


def weights(version: int) -> Manifest:
    tensors = tuple(
        TensorRecord(name=name, dtype="float32", shape=(2,), offset=0, nbytes=8, checksum=100 * version + len(name))
        for name in ("w", "bias")
    )
    return Manifest.single(version=version, location=f"v{version}", tensors=tensors)


@attrs.define
class Script:
    """A controller's life, told. `facts` grows; time passes one second a fact."""

    feed: Feed = attrs.field(factory=lambda: feed(1))
    demonstrations: Feed = attrs.field(factory=lambda: feed(2, retries=0))
    facts: list[facts.Fact] = attrs.field(factory=list)
    version: int = 0

    def tell(self, *told: facts.Fact) -> None:
        self.facts += told

    def state(self) -> dict[str, Any]:
        """The controller's part of a checkpoint."""
        return {
            "step": self.version,
            "feed": self.feed.state_dict(),
            "demonstrations": self.demonstrations.state_dict(),
        }

    def launch(self, *, source: str = "", chain: str = "") -> None:
        self.tell(
            facts.Started(),
            facts.Continued(
                step=self.version,
                source=source,
                chain=chain,
                max_staleness=BOUND,
                groups_per_step=GROUPS,
                group_size=MEMBERS,
                samples_per_step=SAMPLES,
                feeds={"rl": self.feed.state_dict(), "warmup": self.demonstrations.state_dict()},
            ),
            facts.Loaded(weights(self.version)),
            facts.EngineChanged(engine=0, event="committed", version=self.version),
            facts.EngineChanged(engine=0, event="joined", version=self.version),
            facts.Served(version=self.version, seconds=0.5),
        )

    def resume(self, state: dict[str, Any], chain: str) -> Script:
        """Another launch, which continues from `state`; it has a script of its own."""
        script = Script(version=state["step"])
        script.feed.load_state_dict(state["feed"])
        script.demonstrations.load_state_dict(state["demonstrations"])
        script.launch(source=f"step-{state['step']}", chain=chain)
        return script

    # --- groups -------------------------------------------------------------------------------------------------------
    def issue(self, *, placed: bool = True) -> Issue:
        issue = self.feed.next()
        self.tell(facts.Issued(feed="rl", issue=issue))
        if placed:
            self.tell(facts.Placed(group_id=issue.group_id, engine=0, worker="environment-0", version=self.version))
        return issue

    def arrive(self, issue: Issue, *, version: int | None = None, failed: int = 0, admitted: bool = True) -> Group:
        sampled_by = self.version if version is None else version
        name = f"{issue.group_id}.{{}}".format
        group = Group(
            group_id=issue.group_id,
            task=issue.task,
            attempt=issue.attempt,
            started_version=sampled_by,
            rollouts=tuple(
                rollout(name(i), version=sampled_by, reward=float(i % 2), sampled=3 + i)
                for i in range(MEMBERS - failed)
            ),
            failures=tuple(
                Failure(rollout_id=name(i), where="environment", error="no such file")
                for i in range(MEMBERS - failed, MEMBERS)
            ),
        )
        self.tell(facts.Arrived(group=group, admitted=admitted))
        return group

    def drop(self, issue: Issue, reason: str) -> None:
        again = self.feed.retry(issue)
        self.tell(facts.Dropped(group_id=issue.group_id, reason=reason, again=again))

    def group(self, **how: Any) -> Group:
        return self.arrive(self.issue(), **how)

    # --- steps --------------------------------------------------------------------------------------------------------
    def form(self, groups: Sequence[Group]) -> Batch:
        scored = tuple(score(group, lambda g: [reward - 0.5 for reward in g.rewards]) for group in groups)
        batch = self._pack([sample for group in scored for sample in group.samples], "rl")
        ids = tuple(group.group_id for group in groups)
        self.tell(facts.Formed(feed="rl", batch=batch, group_ids=ids, groups=scored))
        return batch

    def _pack(self, samples: Sequence[Sample], phase: Any) -> Batch:
        version = self.version
        return pack(samples, step=version + 1, version=version, phase=phase, ranks=1, micro_batch_tokens=64)

    def train(self, group_ids: Sequence[int], *, publish: bool = True, feed: Feed | None = None) -> None:
        """The batch that was formed is handed over and done."""
        self.tell(facts.Handed(step=self.version + 1))
        self.version += 1
        (feed or self.feed).finish(group_ids)
        self.tell(facts.Trained(step=self.version, manifest=weights(self.version) if publish else None))
        if publish:
            self.tell(facts.Served(version=self.version, seconds=0.25))

    def step(self, groups: Sequence[Group] | None = None) -> None:
        groups = [self.group() for _ in range(GROUPS)] if groups is None else groups
        self.form(groups)
        self.train([group.group_id for group in groups])

    def warm_up(self, *, publish: bool) -> None:
        issues = [self.demonstrations.next() for _ in range(SAMPLES)]
        self.tell(*(facts.Issued(feed="warmup", issue=issue) for issue in issues))
        batch = self._pack([demonstration(issue.task.index) for issue in issues], "warmup")
        ids = tuple(issue.group_id for issue in issues)
        self.tell(facts.Formed(feed="warmup", batch=batch, group_ids=ids, groups=()))
        self.train(ids, publish=publish, feed=self.demonstrations)


def eventful(script: Script | None = None) -> Script:
    """Two warm-up steps, five of rl with everything that can become of a group, and an end in the middle of things."""
    script = script or Script()
    script.launch()
    script.warm_up(publish=False)
    script.warm_up(publish=True)
    script.step()
    early = script.group()
    script.step()
    script.step([early, script.group()])  # one version old
    lost = script.issue()
    script.tell(
        facts.Failed(who=f"group {lost.group_id}", where="environment", sentence="no such file", done="dropped")
    )
    script.drop(lost, "environment")
    again = script.issue()
    assert (again.group_id, again.attempt) == (lost.group_id, 1)
    script.step([script.arrive(again, failed=1), script.group()])
    refused = script.issue()
    script.arrive(refused, version=script.version - 2, admitted=False)
    script.drop(refused, "stale")
    script.drop(script.issue(), "stale")  # its last attempt: given up
    script.tell(facts.EngineChanged(engine=0, event="left", version=script.version, detail="no statistics"))
    script.tell(facts.EngineChanged(engine=0, event="joined", version=script.version))
    script.step()
    script.form([script.group() for _ in range(GROUPS)])
    script.tell(facts.Handed(step=script.version + 1))
    script.group()
    script.issue()
    return script


def arrivals(groups: Sequence[Sequence[int]]) -> list[facts.Fact]:
    """Groups whose first attempt is lost in flight, and whose second comes back with these lengths and is refused."""
    script = Script()
    script.launch()
    for lengths in groups:
        script.drop(script.issue(), "stale")
        again = script.issue()
        rollouts = tuple(rollout(f"{again.group_id}.{n}", sampled=length) for n, length in enumerate(lengths))
        group = Group(group_id=again.group_id, task=again.task, attempt=1, started_version=0, rollouts=rollouts)
        script.tell(facts.Arrived(group=group, admitted=False))
        script.drop(again, "stale")
    return script.facts


def write(path: Path, told: Sequence[facts.Fact], *, start: float = 1000.0) -> str:
    """Into the ledger as one launch; the chain of the newest version."""
    store = Store(path)
    store.write([(start + number, fact) for number, fact in enumerate(told)])
    chain = store.chain
    store.close()
    return chain
