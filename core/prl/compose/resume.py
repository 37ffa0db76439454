"""A stopped, failed or killed run goes on in its own directory, as its next attempt.

    compose run.toml again -> verify or rewrite plugins.lock -> newest complete checkpoint, checked
        -> rewind the record to it -> logs/attempt-<N + 1>, resume.json, a new token

Everything that can be refused is refused before anything is changed. Imports no torch; called by `prl resume`.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from prl import checkpoint_dir
from prl.compose import lock, origin, toml
from prl.compose.compose import Composition, compose, config_table
from prl.compose.discover import installed
from prl.compose.rewind import rewind
from prl.errors import LockError, UserError
from prl.run_dir import RunDir, read_json
from prl.train.layout import on_fewer_nodes


@attrs.frozen(kw_only=True)
class Attempt:
    """What `prl resume` is about to start."""

    composition: Composition
    number: int
    step: int
    """The cut it continues from; 0 is the start."""
    relocked: str
    """What plugins.lock said otherwise before it was rewritten; empty when it was not."""

    @property
    def start(self) -> str:
        """`step 20`, and what else the attempt before it had otherwise."""
        trainer, whole = self.composition.run.trainer, self.composition.resolved["trainer"]["nodes"]
        fewer = f" on {trainer.nodes} of {whole} trainer nodes" if trainer.nodes < whole else ""
        return f"step {self.step}{fewer}"


def resume(
    run_dir: RunDir,
    *,
    plugins: str = "",
    overrides: Sequence[str] = (),
    relock: bool = False,
    check: Callable[[Composition], object] = lambda _: None,
    trainer_nodes: int | None = None,
) -> Attempt:
    """Make the run ready for its next attempt; no process of it may be alive. `check` may refuse, with a PrlError.

    `trainer_nodes`: how many are left of those it was launched with. This attempt trains on them, where [failures] and
    the mesh allow; run.toml stays as it is.

    UserError, ConfigError, LockError or CheckpointError say why it cannot go on; nothing was changed then.
    """
    newest = next(reversed(checkpoint_dir.complete(run_dir.checkpoints)), None)
    start = [f"checkpoints.resume={json.dumps(str(newest))}"] if newest else []
    composition = compose(run_dir.config, plugins=plugins, overrides=[*overrides, *start])
    changed = _locked(run_dir, composition, relock=relock)
    path = composition.run.checkpoints.resume
    step = origin.check(composition, Path(path)).step if path else 0
    _refuse_finished(run_dir, composition, step)
    check(composition)
    _keep_config(run_dir, composition)
    composition, edits = _fitted(composition, trainer_nodes)
    if changed:
        run_dir.write_json(run_dir.lock, lock.derive([p.name for p in composition.plugins], installed()))
    rewind(run_dir, step)
    number = max(run_dir.attempts(), default=0) + 1
    run_dir.logs(number).mkdir(parents=True)
    checkpoint = str(newest.relative_to(run_dir.path)) if newest else ""
    run_dir.write_json(run_dir.resume, {"checkpoint": checkpoint, **({"trainer": edits} if edits else {})})
    run_dir.create_token()
    _announce(run_dir, step)
    return Attempt(composition=composition, number=number, step=step, relocked=changed)


def _fitted(composition: Composition, nodes: int | None) -> tuple[Composition, dict[str, int]]:
    """The composition with the trainer on the nodes that are left, and the values that changed; or as it was."""
    run = composition.run
    if nodes is None or nodes >= run.trainer.nodes:
        return composition, {}
    least = run.failures.minimum_trainer_nodes or math.ceil(run.trainer.nodes / 2)
    trainer = on_fewer_nodes(run.trainer, nodes, least=least)
    if trainer is None:
        return composition, {}
    edits = {name: getattr(trainer, name) for name in ("nodes", "ranks", "replicate", "shard")}
    return attrs.evolve(composition, run=attrs.evolve(run, trainer=trainer)), edits


def _locked(run_dir: RunDir, composition: Composition, *, relock: bool) -> str:
    """What differs from plugins.lock, where that is allowed."""
    names = [plugin.name for plugin in composition.plugins]
    try:
        lock.verify(lock.load(run_dir.lock), names, installed())
    except LockError as error:
        if not relock:
            raise LockError(
                f"{error}\nTo go on with what is here, and have plugins.lock say so: prl resume --relock"
            ) from None
        return str(error)
    return ""


def _refuse_finished(run_dir: RunDir, composition: Composition, step: int) -> None:
    run, state = composition.run, read_json(run_dir.state) or {}
    steps = run.warmup.steps + run.run.steps
    if state.get("status") == "finished" and step >= steps:
        raise UserError(
            f"{run_dir.path} has finished all of its {steps} steps; give it more (--set run.steps=...), or start "
            "another run from it (prl launch CONFIG --from RUN)"
        )


def _keep_config(run_dir: RunDir, composition: Composition) -> None:
    """Rewrite run.toml where the command line changed it; what it was stays with the attempt that ran under it.

    The checkpoint of this attempt is no part of it: `prl launch RUN/run.toml` repeats the run from where it began.
    """
    text = run_dir.config.read_text()
    table = config_table(composition)
    table["checkpoints"]["resume"] = tomllib.loads(text)["checkpoints"]["resume"]
    if toml.dumps(table) != text:
        shutil.copyfile(run_dir.config, run_dir.logs() / run_dir.config.name)
        run_dir.config.write_text(toml.dumps(table))


def _announce(run_dir: RunDir, step: int) -> None:
    """Whoever asks how the run is doing must not be told how the last attempt ended."""
    state = read_json(run_dir.state) or {}
    fresh = {"status": "starting", "error": "", "step": step, "version": step, "updated": time.time()}
    run_dir.write_json(run_dir.state, {**state, **fresh})
