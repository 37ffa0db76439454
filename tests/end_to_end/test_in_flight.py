"""A run is stopped while a group waits in the middle of its conversations: what was said is trained, not said again."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
from prl.dispatch import checkpoint
from prl.ledger import event_log
from prl.ledger.events import Arrived
from prl.rollout import carried
from prl.rollout.carried import CarriedRollout
from prl.types import Rollout

from tests.end_to_end.live import TINY, Run, installed, launched, prl, sets
from tests.listening import needs_proc

pytestmark = needs_proc

WAITING = """
    import asyncio
    from pathlib import Path

    import attrs
    from prl import hookimpl
    from prl.compose.config import EnvironmentConfig
    from prl.providers import Environment, Score
    from prl.types import Task

    @attrs.frozen(kw_only=True)
    class WaitingConfig(EnvironmentConfig):
        folder: str

    @hookimpl
    def prl_environments():
        return [Environment(name="waiting", config=WaitingConfig, summary="waits", build="prl_waiting:build")]

    class Waiting:
        def __init__(self, folder):
            self.folder = folder

        def size(self, split):
            return 1000

        def task(self, split, index):
            return Task(index=index, messages=({"role": "user", "content": "abc"},))

        async def rollout(self, task, conversation):
            await conversation.ask(task.messages)
            group, _, member = conversation.rollout_id.partition(".")
            if member == "1" and (self.folder / "hold").exists():
                (self.folder / f"waits-{group}").touch()
                while (self.folder / "hold").exists():
                    await asyncio.sleep(0.05)
            await conversation.ask([{"role": "user", "content": "def"}])

        async def score(self, task, conversations):
            return [Score(reward=float(len(conversation.reply))) for conversation in conversations]

        def demonstration(self, task):
            return None

        async def aclose(self):
            pass

    def build(config, seed):
        return Waiting(Path(config.folder))
"""
"""An environment of two turns; while there is a file `hold`, the second member of a group waits between them."""
EDITS = ("warmup.steps=0", "evaluation.every=0", "checkpoints.every=0", "scheduler.max_staleness=8", "trackers=[]")
MORE_STEPS = 12


@attrs.frozen
class Stopped:
    """The run after it was stopped, gone on with, and finished."""

    run: Run
    waited: int
    """Id of a group whose second member waited."""
    kept: dict[int, tuple[CarriedRollout, ...]]
    """By group, from the checkpoint it was stopped with."""
    cut: int


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    folder = tmp_path_factory.mktemp("in-flight")
    hold, config = folder / "hold", folder / "tiny.toml"
    env = {"PYTHONPATH": str(installed(folder, "waiting", WAITING))}
    config.write_text(TINY.replace("extends", 'plugins = ["waiting"]\nextends'))
    environment = f'environments=[{{type = "waiting", name = "waiting", folder = "{folder}"}}]'
    with launched(config, folder / "run", "run.steps=2000", environment, *EDITS, env=env) as run:
        run.until(lambda: len(run.rl_steps) >= 2)
        hold.touch()
        run.until(lambda: list(folder.glob("waits-*")))
        assert prl("stop", str(run.dir.path), env=env).returncode == 0
        assert run.end()[0] == 0
    waited = min(int(path.name.partition("-")[2]) for path in folder.glob("waits-*"))
    cut = run.state["step"]
    kept = {entry.group_id: carried.read(entry).rollouts for entry in checkpoint.read(run.checkpoint).in_flight}
    hold.unlink()
    done = prl("resume", str(run.dir.path), *sets([f"run.steps={cut + MORE_STEPS}"]), env=env)
    assert done.returncode == 0, done.stderr
    return Stopped(run=Run(dir=run.dir), waited=waited, kept=kept, cut=cut)


def test_both_members_are_kept_as_far_as_they_came(stopped: Stopped) -> None:
    members = {rollout.member: rollout for rollout in stopped.kept[stopped.waited]}
    assert len(members[1].completions) == 1
    assert set(members) == {0, 1}
    versions = [int(version) for rollout in members.values() for c in rollout.completions for version in c.versions]
    assert 0 <= min(versions) <= max(versions) <= stopped.cut


def test_what_was_kept_is_what_arrives_and_is_trained(stopped: Stopped) -> None:
    path = event_log.path_of(stopped.run.dir, 2)
    events = [event for _, event in event_log.read(path) if isinstance(event, Arrived)]
    groups = {event.group.group_id: event.group for event in events if event.group.attempt == 0 and not event.restored}
    assert stopped.waited in groups
    for group_id in groups.keys() & stopped.kept.keys():
        rollouts = {int(rollout.rollout_id.partition(".")[2]): rollout for rollout in groups[group_id].rollouts}
        for begun in stopped.kept[group_id]:
            assert_begins_with(rollouts[begun.member], begun)
    trained = {line["group_id"] for line in stopped.run.rollouts if line["step"] > stopped.cut}
    assert stopped.waited in trained


def assert_begins_with(rollout: Rollout, begun: CarriedRollout) -> None:
    """Token by token, with the log-probabilities and versions they were sampled with."""
    np.testing.assert_array_equal(rollout.tokens[: len(begun.tokens)], begun.tokens)
    for start, completion in zip(begun.starts, begun.completions, strict=True):
        sampled = slice(start, start + len(completion.tokens))
        np.testing.assert_array_equal(rollout.logprobs[sampled], completion.logprobs)
        np.testing.assert_array_equal(rollout.versions[sampled], completion.versions)


def test_the_record_is_whole_and_both_launches_are_replayed(stopped: Stopped) -> None:
    path = str(stopped.run.dir.path)
    env = {"PYTHONPATH": str(stopped.run.dir.path.parent / "site")}
    audit = prl("audit", path, env=env)
    assert audit.returncode == 0, audit.stdout
    replayed = prl("replay", path, env=env)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    launches = [line.partition(":")[0] for line in replayed.stdout.splitlines() if line.startswith("launch")]
    assert launches == ["launch 1", "launch 2"]
