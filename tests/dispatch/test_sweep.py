"""Large columns in a run: the trainer reads its samples' own, and files go when their attempt is over."""

from __future__ import annotations

import asyncio

import numpy as np
from prl.columns import ColumnFolder
from prl.dispatch.feed import Feed, Source
from prl.dispatch.progress import Progress
from prl.dispatch.sweep import ColumnSweep
from prl.messages import TrainStep

from tests.dispatch.fakes import FakeEnvironment, FakeRun, FakeTrainer, answer_with_columns, columns_of, toy_run


def feed() -> Feed:
    return Feed([Source(environment="toy", weight=1.0, size=9)], seed=0, retries=2)


def write(folder: ColumnFolder, group_id: int, attempt: int = 0) -> None:
    folder.write({"x": np.zeros(3, dtype=np.uint8)}, group_id=group_id, attempt=attempt)


def test_files_go_with_the_step_after_which_nobody_reads_them(tmp_path):
    folder, issues, progress = ColumnFolder(tmp_path), feed(), Progress(steps=3)
    trained, again, running = issues.next(), issues.next(), issues.next()
    for group_id in (trained.group_id, again.group_id, running.group_id, -1, 77):
        write(folder, group_id)

    async def until(expected: set[str]) -> None:
        while {file.rpartition(".")[0] for file in folder.files()} != expected:
            await asyncio.sleep(0)

    async def scene() -> None:
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            sweeping = tasks.create_task(ColumnSweep(folder=folder, feed=issues, progress=progress).run())
            await until({"0.0", "1.0", "2.0"})  # left by an evaluation, and by who knows whom
            issues.finish([trained.group_id])
            issues.retry(again)
            write(folder, again.group_id, attempt=1)
            progress.trained = 1
            progress.change.notify()
            await until({"1.1", "2.0"})
            sweeping.cancel()

    asyncio.run(scene())


def test_the_trainer_reads_what_the_environment_wrote_and_nothing_is_left(tmp_path):
    folder, seen = ColumnFolder(tmp_path / "columns"), []

    def read(step: TrainStep) -> None:
        lengths = [length for micro in step.batch.ranks[0] for length in np.diff(micro.cu_seqlens)]
        columns = columns_of(step, folder)
        assert [column.shape for column in columns] == [(length, 2) for length in lengths]
        seen.extend(columns)

    environment, trainer = FakeEnvironment(reply=answer_with_columns(folder)), FakeTrainer(before_step=read)
    FakeRun(tmp_path, toy_run(steps=3), environments=[environment], trainers=[trainer]).go()
    assert len(seen) == 3 * 2 * 4
    assert sum(int(column.max()) for column in seen) == 3 * 2 * 2
    assert folder.files() == []
