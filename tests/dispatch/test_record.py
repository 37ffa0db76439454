"""The files of a run."""

from __future__ import annotations

import asyncio
import json

import attrs
import numpy as np
from prl.dispatch.record import Record, StateFile, rollout_lines
from prl.run_dir import RunDir, read_json
from prl.score.credit import score
from prl.types import Group, TaskRef

from tests.dispatch.fakes import rollout


def group() -> Group:
    source = rollout("7.0", sampled=4)
    mixed = attrs.evolve(source, versions=np.array([-1, -1, 3, 3, 3, 5], dtype=np.int32))
    task = TaskRef(environment="toy", split="train", index=4)
    return Group(group_id=7, task=task, attempt=1, started_version=3, rollouts=(mixed,))


def test_versions_of_a_rollout_are_run_length_coded():
    (line,) = rollout_lines(9, [score(group(), lambda g: [0.5])])
    assert (line["versions"], line["version_tokens"]) == ([3, 5], [3, 1])
    assert (line["step"], line["group_id"], line["member"], line["attempt"]) == (9, 7, "0", 1)
    assert line["task"] == {"environment": "toy", "split": "train", "index": 4}
    assert (line["length"], line["advantage"]) == (4, 0.5)
    assert json.loads(json.dumps(line)) == line


def test_lines_are_whole_as_soon_as_they_are_written_and_files_are_continued(tmp_path):
    for step in (1, 2):
        record = Record(RunDir(tmp_path))
        record.metrics({"step": step})
        record.rollouts(step, [score(group(), lambda g: [0.5])])
        assert (tmp_path / "metrics.jsonl").read_text().endswith(f'{{"step": {step}}}\n')
        record.close()
    assert len((tmp_path / "rollouts.jsonl").read_text().splitlines()) == 2


def test_the_state_file_says_what_is_going_on(tmp_path):
    run_dir = RunDir(tmp_path)
    state = StateFile(run_dir, steps=4)
    assert read_json(run_dir.state)["status"] == "starting"
    state.update(status="running", step=2)
    state.write()
    written = read_json(run_dir.state)
    assert (written["status"], written["step"], written["steps"], written["error"]) == ("running", 2, 4, "")
    assert written["updated"] > 0


def test_the_state_loop_writes_what_changed(tmp_path):
    run_dir = RunDir(tmp_path)

    async def body() -> None:
        state = StateFile(run_dir, steps=4)
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            loop = tasks.create_task(state.run())
            state.update(step=3)
            while read_json(run_dir.state)["step"] != 3:
                await asyncio.sleep(0)
            loop.cancel()

    asyncio.run(body())
    assert list(tmp_path.iterdir()) == [run_dir.state]
