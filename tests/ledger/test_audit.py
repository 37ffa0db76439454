"""What an audit proves, and that each violation is found: histories told as they should be, and then bent."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import attrs
import pytest
from prl.errors import RunError
from prl.ledger import facts
from prl.ledger.audit import audit
from prl.ledger.report import Audit, Check
from prl.run_dir import RunDir

from tests.ledger.histories import BOUND, GROUPS, Script, eventful, weights, write

FIRST_TASK = "SELECT task FROM issues WHERE group_id = 0 AND feed = 'rl'"


def checks(found: Audit) -> dict[str, Check]:
    return {check.name: check for check in found.checks}


def failed(found: Audit) -> set[str]:
    return {check.name for check in found.checks if not check.passed}


def problems(found: Audit) -> str:
    return "\n".join(problem for check in found.checks for problem in check.problems)


def audited(folder: Path, told: list[facts.Fact], *changes: str) -> Audit:
    """The audit of a history, after statements that bend its record."""
    run_dir = RunDir(folder)
    write(run_dir.ledger, told)
    with sqlite3.connect(run_dir.ledger) as ledger:
        for change in changes:
            assert ledger.execute(change).rowcount > 0, change
    ledger.close()
    return audit(run_dir)


# --- as it should be --------------------------------------------------------------------------------------------------
def test_an_eventful_history_passes_with_its_numbers(tmp_path):
    found = audited(tmp_path, eventful().facts)
    assert problems(found) == ""
    assert found.passed
    numbers = {name: check.numbers for name, check in checks(found).items()}
    assert numbers["prompts (rl)"] == ("15 groups: 10 trained, 2 in a batch, 1 given up: stale, 1 ready, 1 in flight")
    assert numbers["prompts (warm-up)"] == "6 groups: 6 trained"
    assert numbers["batches"] == "6 rl batches, 2 warmup batches; step 8 is not done"
    assert numbers["versions"] == "versions 0-7: 7 published, 7 served by all engines"
    assert numbers["staleness"].startswith("bound 1; 115 sampled tokens: 89.6% at 0, 10.4% at 1")
    assert found.launches == ("launch 1: from step 0, did 7 steps (1-7); has not ended, or was killed",)


def test_what_was_dropped_is_compared_with_what_was_trained(tmp_path):
    shares = {share.end: share for share in audited(tmp_path, eventful().facts).bias}
    assert shares["trained"].attempts == 10
    assert shares["trained"].rollouts == 29
    assert shares["trained"].length == pytest.approx(115 / 29)
    stale = shares["dropped: stale"]
    assert (stale.attempts, stale.rollouts, stale.length, stale.reward) == (1, 3, 4.0, pytest.approx(1 / 3))
    lost = shares["dropped: environment"]
    assert (lost.attempts, lost.rollouts, lost.length, lost.reward, lost.seconds) == (1, 0, None, None, 2.0)
    assert shares["dropped: stale, given up"].attempts == 1


def test_what_cannot_be_proven_is_said(tmp_path):
    unproven = "\n".join(audited(tmp_path, eventful().facts).unproven)
    assert "2 attempts cut or lost in flight: they had run for 1.5 s on average, arrivals took 1.0 s" in unproven
    assert "weights that were not published (version 1)" in unproven


def test_without_a_ledger_there_is_nothing_to_audit(tmp_path):
    with pytest.raises(RunError, match="there is no ledger at"):
        audit(RunDir(tmp_path))


def test_a_run_that_never_began_passes(tmp_path):
    found = audited(tmp_path, [facts.Started(), facts.Ended(status="failed", error="no engine came")])
    assert found.passed
    assert found.launches == ("launch 1: ended before every worker was there; failed: no engine came",)


# --- prompts ----------------------------------------------------------------------------------------------------------
def test_a_prompt_trained_twice_is_found(tmp_path):
    script = Script()
    script.launch()
    first = [script.group() for _ in range(GROUPS)]
    script.form(first)
    script.train([group.group_id for group in first])
    script.step()
    change = "INSERT INTO members VALUES (2, 2, 1)"
    found = audited(tmp_path, script.facts, change)
    assert failed(found) == {"prompts (rl)", "batches", "staleness"}
    assert "group 0 was trained 2 times, in steps 1-2" in problems(found)


def test_a_prompt_issued_again_after_it_was_trained_is_found(tmp_path):
    script = Script()
    script.launch()
    issues = [script.issue() for _ in range(GROUPS)]
    groups = [script.arrive(issue) for issue in issues]
    script.step(groups)
    script.tell(facts.Issued(feed="rl", issue=issues[1]))
    found = audited(tmp_path, script.facts)
    assert failed(found) == {"prompts (rl)"}
    assert problems(found) == "group 1 was trained in step 1 and issued again"


def test_a_prompt_that_was_passed_over_is_found(tmp_path):
    script = Script()
    script.launch()
    script.step()
    script.feed.next()
    script.step()
    found = audited(tmp_path, script.facts)
    assert failed(found) == {"prompts (rl)", "order (rl)"}
    assert "group 2 was passed over: launch 1 neither carried nor issued it" in problems(found)
    assert "toy: positions 2 of the order were passed over" in problems(found)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("position = 0 WHERE group_id = 1 AND feed = 'rl'", "position 0 of the order belongs to groups 0-1"),
        (f"task = ({FIRST_TASK}) WHERE group_id = 1 AND feed = 'rl'", "was issued 2 times in epoch 0"),
        ("position = 9 WHERE group_id = 4 AND feed = 'warmup'", "positions 4, 6-8 of the order"),
    ],
)
def test_tasks_out_of_order_are_found(tmp_path, change, problem):
    found = audited(tmp_path, eventful().facts, f"UPDATE issues SET {change}")
    assert {name.split()[0] for name in failed(found)} == {"order"}
    assert problem in problems(found)


# --- resuming ---------------------------------------------------------------------------------------------------------
def interrupted() -> tuple[Script, dict[str, Any]]:
    """Killed in step 3, with a checkpoint of step 1 at which one group was in flight and one ready."""
    script = Script()
    script.launch()
    groups = [script.group() for _ in range(GROUPS)]
    script.group()
    script.issue()
    script.form(groups)
    script.train([group.group_id for group in groups])
    state = script.state()
    script.step()
    script.form([script.group() for _ in range(GROUPS)])
    script.tell(facts.Handed(step=3))
    return script, state


def resumed(folder: Path, *, bend: Any = lambda state: state) -> Audit:
    script, state = interrupted()
    run_dir = RunDir(folder)
    write(run_dir.ledger, script.facts)
    with sqlite3.connect(run_dir.ledger) as ledger:
        chain = ledger.execute("SELECT chain FROM versions WHERE version = 1").fetchone()[0]
    ledger.close()
    second = script.resume(bend(state), chain)
    for _ in range(3):
        second.step()
    second.tell(facts.Ended(status="finished", error=""))
    write(run_dir.ledger, second.facts, start=2000.0)
    return audit(run_dir)


def test_a_resumed_history_passes_and_its_interrupted_groups_are_trained_once(tmp_path):
    found = resumed(tmp_path)
    assert problems(found) == ""
    assert checks(found)["prompts (rl)"].numbers == "8 groups: 8 trained"
    assert checks(found)["resumes"].numbers == "1 resume compared with the weights as they were published"
    assert checks(found)["versions"].numbers == "versions 0-4: 5 published, 5 served by all engines"
    assert found.launches == (
        "launch 1: from step 0, did 2 steps (1-2); was killed",
        "launch 2: from step 1, did 3 steps (2-4); finished",
    )
    undone = {share.end: share for share in found.bias}["undone by a resume"]
    assert (undone.attempts, undone.rollouts) == (6, 15)


def test_a_prompt_that_a_resume_loses_is_found(tmp_path):
    """As where the groups in flight at a checkpoint are forgotten."""

    def forget(state):
        state["feed"]["outstanding"] = [i for i in state["feed"]["outstanding"] if i["group_id"] != 3]
        return state

    found = resumed(tmp_path, bend=forget)
    assert failed(found) == {"prompts (rl)"}
    assert problems(found) == "group 3 was in flight when launch 1 ended, and never issued again"


def test_a_prompt_that_a_resume_repeats_is_found(tmp_path):
    def repeat(state):
        issue = {
            "group_id": 0,
            "attempt": 0,
            "position": 0,
            "task": {"environment": "toy", "split": "train", "index": 0},
        }
        state["feed"]["outstanding"].insert(0, issue)
        return state

    found = resumed(tmp_path, bend=repeat)
    assert "prompts (rl)" in failed(found)
    assert "group 0 was trained 2 times, in steps 1-2" in problems(found)


def test_a_resume_with_other_weights_is_found(tmp_path):
    script, state = interrupted()
    second = script.resume(state, "")
    other = next(i for i, fact in enumerate(second.facts) if isinstance(fact, facts.Loaded))
    second.facts[other] = facts.Loaded(attrs.evolve(weights(77), version=1))
    assert audited(tmp_path, script.facts).passed
    write(RunDir(tmp_path).ledger, second.facts, start=2000.0)
    found = audit(RunDir(tmp_path))
    assert failed(found) == {"resumes"}
    assert problems(found) == "launch 2 continues from step 1 with other weights than were published then"


def test_a_checkpoint_of_another_run_is_found(tmp_path):
    script, state = interrupted()
    write(RunDir(tmp_path).ledger, script.facts)
    write(RunDir(tmp_path).ledger, script.resume(state, "f" * 64).facts, start=2000.0)
    assert failed(audit(RunDir(tmp_path))) == {"resumes"}


def test_a_fork_begins_with_the_chain_it_was_given(tmp_path):
    script, state = interrupted()
    fork = script.resume(state, "a" * 64)
    fork.step()
    found = audited(tmp_path, fork.facts)
    assert problems(found) == ""
    assert "what was trained before step 1: this run continues another run's checkpoint" in found.unproven
    assert checks(found)["prompts (rl)"].numbers == "2 groups: 2 trained"


# --- staleness, batches -----------------------------------------------------------------------------------------------
def test_a_token_above_the_bound_is_found(tmp_path):
    script = Script()
    script.launch()
    old = script.group()
    for _ in range(BOUND + 1):
        script.step()
    script.step([old, script.group()])
    found = audited(tmp_path, script.facts)
    assert failed(found) == {"staleness"}
    assert "rollout 0.0, trained in step 3, has 3 tokens above the bound 1, the oldest at staleness 2" in problems(
        found
    )


def test_one_old_token_among_many_is_found(tmp_path):
    change = "UPDATE rollouts SET versions = '3:1,6:2', oldest = 3 WHERE member = 0 AND issue = (SELECT max(issue) FROM"
    change += " members WHERE batch = 7)"
    found = audited(tmp_path, eventful().facts, change)
    assert "has 1 token above the bound 1, the oldest at staleness 3" in problems(found)
    assert "the columns of the batch of step 7 have staleness 0 to 0, its rollouts 0 to 3" in problems(found)


@pytest.mark.parametrize(
    ("change", "name", "problem"),
    [
        (
            "DELETE FROM members WHERE batch = 4 AND ordinal = 0",
            "batches",
            "the batch of step 4 has 1 groups, expected 2",
        ),
        ("UPDATE batches SET sampled = sampled + 1 WHERE id = 4", "batches", "the batch of step 4 has"),
        (
            "DELETE FROM rollouts WHERE issue = (SELECT issue FROM members WHERE batch = 4)",
            "batches",
            "1 group without",
        ),
        ("UPDATE batches SET step = 4 WHERE id = 5", "batches", "step 4 has 2 batches"),
        (
            "UPDATE rollouts SET versions = '9:3', oldest = 9, newest = 9 WHERE member = 0",
            "staleness",
            "newer than the",
        ),
        ("UPDATE rollouts SET length = length + 1", "staleness", "do not add up to what is said of it"),
    ],
)
def test_batches_that_are_not_whole_are_found(tmp_path, change, name, problem):
    found = audited(tmp_path, eventful().facts, change)
    assert name in failed(found)
    assert problem in problems(found)


# --- versions ---------------------------------------------------------------------------------------------------------
def test_a_missing_version_is_found(tmp_path):
    found = audited(tmp_path, eventful().facts, "DELETE FROM versions WHERE version = 4")
    assert failed(found) == {"versions", "chain"}
    assert "versions 4 are missing" in problems(found)
    assert "steps 4 were trained and made no version" in problems(found)
    assert "version 5 does not follow version 3" in problems(found)


def test_a_version_made_twice_is_found(tmp_path):
    columns = "version, launch, parent, batch, manifest, chain, made_at, NULL, NULL, NULL"
    copy = f"INSERT INTO versions SELECT id + 50, {columns}"
    found = audited(tmp_path, eventful().facts, f"{copy} FROM versions WHERE version = 4")
    assert "versions 4 were made more than once" in problems(found)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE versions SET chain = 'f' || substr(chain, 2) WHERE version = 3 AND substr(chain, 1, 1) != 'f'",
        "UPDATE versions SET manifest = 'other' WHERE version = 3",
        "UPDATE versions SET parent = 'other' WHERE version = 3",
        "UPDATE versions SET batch = 'other' WHERE version = 3",
        "UPDATE batches SET digest = 'other' WHERE step = 3",
    ],
)
def test_a_broken_chain_is_found(tmp_path, change):
    found = audited(tmp_path, eventful().facts, change)
    assert failed(found) == {"chain"}
    assert "version 3" in problems(found)


def test_a_version_that_was_never_made_is_found_where_it_is_used(tmp_path):
    found = audited(tmp_path, eventful().facts, "UPDATE issues SET version = 44 WHERE id = 9")
    assert failed(found) == {"versions"}
    assert "was dispatched at version 44, which was never made" in problems(found)


# --- checkpoints, the file --------------------------------------------------------------------------------------------
def with_checkpoint(folder: Path, state: dict[str, Any], **changes: Any) -> Audit:
    run_dir = RunDir(folder)
    script, _ = interrupted()
    write(run_dir.ledger, script.facts)
    with sqlite3.connect(run_dir.ledger) as ledger:
        chain = ledger.execute("SELECT chain FROM versions WHERE version = ?", (state["step"],)).fetchone()[0]
    ledger.close()
    checkpoint = run_dir.checkpoints / f"step-{state['step']}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "controller.json").write_text(json.dumps({**state, "chain": chain, **changes}))
    return audit(run_dir)


def test_a_consistent_checkpoint_passes(tmp_path):
    _, state = interrupted()
    found = with_checkpoint(tmp_path, state)
    assert found.passed
    assert checks(found)["checkpoints"].numbers == "1 checkpoint, of steps 1"


def test_a_checkpoint_that_would_lose_or_repeat_a_prompt_is_found(tmp_path):
    _, state = interrupted()
    feed = state["feed"]
    assert [issue["group_id"] for issue in feed["outstanding"]] == [2, 3]
    feed["outstanding"] = [{**feed["outstanding"][0], "group_id": 0}, feed["outstanding"][1]]
    found = with_checkpoint(tmp_path, state)
    assert failed(found) == {"checkpoints"}
    assert "checkpoint step-1 would lose groups 2: neither trained nor outstanding" in problems(found)
    assert "checkpoint step-1 would train groups 0 a second time" in problems(found)


def test_a_foreign_or_damaged_checkpoint_is_found(tmp_path):
    _, state = interrupted()
    found = with_checkpoint(tmp_path, state, chain="f" * 64)
    assert problems(found) == "checkpoint step-1 belongs to no version on record"
    (tmp_path / "checkpoints/step-1/controller.json").write_text("{")
    assert "cannot be read" in problems(audit(RunDir(tmp_path)))


def test_a_dangling_reference_is_found(tmp_path):
    found = audited(tmp_path, eventful().facts, "INSERT INTO members VALUES (3, 9, 999)")
    assert "ledger" in failed(found)


def test_another_file_is_no_ledger(tmp_path):
    with sqlite3.connect(RunDir(tmp_path).ledger) as other:
        other.execute("CREATE TABLE t (x)")
    other.close()
    with pytest.raises(RunError, match="is not a ledger: its application id is 0x0"):
        audit(RunDir(tmp_path))


def test_a_newer_ledger_is_refused(tmp_path):
    write(RunDir(tmp_path).ledger, [facts.Started()])
    with sqlite3.connect(RunDir(tmp_path).ledger) as ledger:
        ledger.execute("PRAGMA user_version = 9")
    ledger.close()
    with pytest.raises(RunError, match="has ledger format 9, this prl reads 1"):
        audit(RunDir(tmp_path))
