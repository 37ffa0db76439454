"""Launch by launch, a run is replayed in a run directory of its own: `<run>/replay`.

Each launch runs under the config it had, by the run's own launcher, from where the replay of the one before it ended.
Nothing of the run itself is changed. Imports no torch; called by `prl replay`.
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import attrs
import cattrs

from prl.compose import origin, toml
from prl.compose.compose import Composition, open_run
from prl.compose.plan import replay_plan
from prl.errors import RunError, UserError
from prl.ledger.event_log import columns_of
from prl.replay.history import Segment, head, segments
from prl.replay.order import ORDER, REPORT, Order, Report
from prl.run_dir import RunDir, read_json


@attrs.frozen(kw_only=True)
class Replayed:
    """What came of the replay of one launch."""

    segment: Segment
    report: Report

    @property
    def complete(self) -> bool:
        return self.report.trained >= self.segment.end and not self.report.error


def replay(run_dir: RunDir, *, until: int | None, tell: bool) -> Iterator[Replayed]:
    """Every launch that counts, up to step `until`, and no further than the first that differs or ends early.

    UserError when there is nothing to replay, LockError when the plugins are not those of the run.
    """
    start = ""
    for segment in segments(run_dir, until):
        scratch, composition = _prepare(run_dir, segment, start)
        start = str(scratch.checkpoints / f"step-{segment.end}") if segment.followed_by else ""
        order = Order(
            run=str(run_dir.path),
            launch=segment.launch,
            log=str(segment.log),
            end=segment.end,
            followed_by=str(segment.followed_by or ""),
            checkpoint=start,
            tell=tell,
        )
        done = Replayed(segment=segment, report=_launch(composition, scratch, order))
        yield done
        if not done.complete:
            break
    shutil.rmtree(RunDir(run_dir.replay).checkpoints, ignore_errors=True)


def _prepare(run_dir: RunDir, segment: Segment, start: str) -> tuple[RunDir, Composition]:
    """The directory of the replay, with the config and the lock of the launch.

    `start` is the replay's own checkpoint; the first launch may have started from one of another run, which must be
    there still.
    """
    scratch = RunDir(run_dir.replay)
    begun, continued = head(segment.log)
    table = tomllib.loads(begun.config)
    table["checkpoints"] |= {"huggingface": False, "resume": start or continued.source}
    try:
        if not start:
            shutil.rmtree(scratch.path, ignore_errors=True)
        scratch.logs(segment.launch).mkdir(parents=True)
        scratch.config.write_text(toml.dumps(table))
        scratch.lock.write_text(begun.lock)
        scratch.create_token()
        (scratch.path / REPORT).unlink(missing_ok=True)
        scratch.columns.unlink(missing_ok=True)
        scratch.columns.symlink_to(columns_of(run_dir, segment.launch), target_is_directory=True)
    except OSError as error:
        raise UserError(f"a replay works in {scratch.path}, and that cannot be written: {error}") from error
    composition = open_run(scratch)
    if continued.source and not start:
        origin.check(composition, Path(continued.source))
    return scratch, composition


def _launch(composition: Composition, scratch: RunDir, order: Order) -> Report:
    scratch.write_json(scratch.path / ORDER, cattrs.unstructure(order))
    launcher = composition.build(composition.run.launcher, scratch.path)
    launcher.launch(replay_plan(composition, scratch))
    found = read_json(scratch.path / REPORT)
    if found is None:
        raise RunError(f"the replay of launch {order.launch} failed; its logs are in {scratch.logs()}")
    return cattrs.structure(found, Report)
