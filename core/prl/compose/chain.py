"""`prl launch --after RUN`: a run that begins when another has finished, from that one's checkpoint where it says so.

    <run>/chain.json      which run it follows, and whose checkpoint it starts from; `begun` once that is settled

The checkpoint does not exist when the run is made, so it is looked for, checked and written into run.toml when the run
before has finished: by `prl launch` and `prl resume`, or by the job that a launcher had wait for another. Imports no
torch.
"""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import cattrs

from prl import checkpoint_dir
from prl.checkpoint_dir import step_of
from prl.compose import origin, toml
from prl.compose.compose import compose, config_table
from prl.errors import RunError, UserError
from prl.run_dir import RunDir, read_json


@attrs.frozen(kw_only=True)
class Chain:
    """What chain.json holds."""

    after: str
    """Run directory."""
    start: str = ""
    """Run directory whose checkpoint it starts from; empty: it starts from nothing of another's."""
    step: int | None = None
    """Of that checkpoint; None: the newest."""
    begun: bool = False


def write(run_dir: RunDir, chain: Chain) -> None:
    run_dir.write_json(run_dir.chain, attrs.asdict(chain))


def awaited(run_dir: RunDir) -> RunDir | None:
    """The run that this one follows, as long as it has not begun."""
    chain = _read(run_dir)
    return None if chain is None or chain.begun else RunDir.existing(chain.after)


def _read(run_dir: RunDir) -> Chain | None:
    stored = read_json(run_dir.chain)
    return None if stored is None else cattrs.structure(stored, Chain)


def has_finished(run_dir: RunDir) -> bool:
    """Whether a run came to its end: one that was stopped or failed may yet go on."""
    return (read_json(run_dir.state) or {}).get("status") == "finished"


def settle(run_dir: RunDir) -> None:
    """Make a run that follows another ready to begin; again does no harm. A PrlError says why it cannot."""
    chain = _read(run_dir)
    if chain is None or chain.begun:
        return
    before = RunDir.existing(chain.after)
    if not has_finished(before):
        status = (read_json(before.state) or {}).get("status", "starting")
        raise RunError(
            f"{before.path}, which this run follows, has not finished (status {status}); when it has: "
            f"prl resume {run_dir.path}"
        )
    if chain.start:
        checkpoint = json.dumps(str(checkpoint_of(RunDir.existing(chain.start), chain.step)))
        composition = compose(run_dir.config, overrides=[f"checkpoints.resume={checkpoint}"], probe=False)
        origin.check_launch(composition)
        run_dir.config.write_text(toml.dumps(config_table(composition)))
    write(run_dir, attrs.evolve(chain, begun=True))


def checkpoint_of(run_dir: RunDir, step: int | None) -> Path:
    """The complete checkpoint of that step, or the newest; UserError names those there are."""
    complete = {step_of(path): path for path in checkpoint_dir.complete(run_dir.checkpoints)}
    if not complete:
        raise UserError(f"{run_dir.path} has no complete checkpoint")
    chosen = max(complete) if step is None else step
    if chosen not in complete:
        raise UserError(
            f"{run_dir.path} has no checkpoint of step {chosen}; it has those of {', '.join(map(str, complete))}"
        )
    return complete[chosen]
