"""What a run starts from: the checkpoint that its config names, checked before any process is started.

A checkpoint belongs to a model, a tokenizer, a kind of optimizer and a number format: its identity. The trainer's ranks
and their mesh may change.
The manifest, the controller's part and every file's size are checked here, where a refusal costs nothing; each rank
verifies its own shards. Imports no torch; called by the command line and, for the identity, by the controller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prl import checkpoint_dir
from prl.checkpoint_dir import CONTROLLER_FILES, CheckpointManifest
from prl.compose import toml
from prl.compose.compose import Composition
from prl.errors import UserError


def identity(composition: Composition) -> dict[str, Any]:
    """Dotted path -> value of every setting that weights and optimizer state depend on."""
    table = composition.resolved
    settings = {
        "model": table["model"],
        "tokenizer": _tokenizer(table["tokenizer"]),
        "optimizer": {"type": table["optimizer"]["type"]},
        "quantization": table["quantization"],
    }
    return toml.flatten(settings)


def _tokenizer(section: Mapping[str, Any]) -> dict[str, Any]:
    """A file may lie elsewhere; what it holds may not differ."""
    file = section["file"]
    return {**section, "file": f"sha256 {hashlib.sha256(Path(file).read_bytes()).hexdigest()}" if file else ""}


def check(composition: Composition, path: Path) -> CheckpointManifest:
    """CheckpointError when the run cannot start from this checkpoint: damaged as far as can be seen, or foreign."""
    manifest = checkpoint_dir.read_manifest(path)
    checkpoint_dir.check_identity(path, manifest, identity(composition))
    checkpoint_dir.check_sizes(path, manifest)
    checkpoint_dir.verify(path, manifest, CONTROLLER_FILES)
    return manifest


def check_launch(composition: Composition) -> None:
    """`check` where the config names a checkpoint, and UserError when nothing would be left to train."""
    run = composition.run
    if not run.checkpoints.resume:
        return
    manifest = check(composition, Path(run.checkpoints.resume))
    steps = run.warmup.steps + run.run.steps
    if manifest.step >= steps:
        raise UserError(
            f"checkpoint {run.checkpoints.resume} is at step {manifest.step}, and this run ends after step {steps} "
            "(warmup.steps + run.steps); steps go on counting from the checkpoint: give a higher run.steps"
        )
