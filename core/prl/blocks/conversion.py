"""A checkpoint from one number format to another, a tensor at a time, without building the model.

What may be quantised is told by the family's plugin. Called by `prl weights convert`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from prl.blocks.checkpoint import read_config, restored
from prl.blocks.form import Form, declaration_of
from prl.blocks.tensor_folder import INDEX, MAX_SHARD_BYTES, StoredTensors, check_empty, write
from prl.errors import CheckpointError
from prl.providers import NumberFormat


@attrs.frozen(kw_only=True)
class Converted:
    """What was written."""

    tensors: int
    nbytes: int
    copied: bool
    """The format was the same: every tensor has its bits."""


def convert(
    source: Path,
    target: Path,
    form: Form | None,
    number_format: NumberFormat,
    formats: Sequence[NumberFormat],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Converted:
    """Write the checkpoint in `source` to the empty folder `target`, in `number_format`.

    `form` says the same with what the family excepts; None: the family is not known, and only a checkpoint that has the
    format already can be written, with files of another size. `formats` are those a source may have.
    """
    config = read_config(source)
    declared = declaration_of(config)
    check_empty(target)
    copied = declared is not None and number_format.reads(declared)
    if not copied and form is None:
        raise CheckpointError(
            f"{source}: no installed model plugin knows checkpoints of model_type {config.get('model_type')!r}, so "
            "nothing says which of their tensors may be rounded"
        )
    if copied:
        stored: Mapping[str, Tensor] = StoredTensors(source)
        planned = list(StoredTensors(source).header().items())
        tensors = _as_stored(stored, planned)
    else:
        assert form is not None, "refused above"
        header, stored = restored(source, reading(source, formats))
        planned = list(_formed(header, list(header), form))
        tensors = _formed(stored, list(header), form)
        config = form.declared(_undeclared(config), planned)
    write(target, planned, tensors, max_shard_bytes=max_shard_bytes)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _copy_rest(source, target)
    return Converted(tensors=len(planned), nbytes=sum(t.nbytes for _, t in planned), copied=copied)


def reading(folder: Path, formats: Sequence[NumberFormat]) -> NumberFormat | None:
    """The format that reads a folder; None where it is not quantised, or nothing reads it."""
    declared = declaration_of(read_config(folder))
    return None if declared is None else next((f for f in formats if f.reads(declared)), None)


def _as_stored(stored: Mapping[str, Tensor], planned: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, stored[name]) for name, _ in planned)


def _formed(tensors: Mapping[str, Tensor], names: Sequence[str], form: Form) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        yield from form.apply(name, tensors[name])


def _undeclared(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model without a word on number formats."""
    said = ("quantization_config", "compression_config", "dtype", "torch_dtype")
    rest = {key: value for key, value in config.items() if key not in said}
    if isinstance(rest.get("text_config"), dict):
        rest["text_config"] = _undeclared(rest["text_config"])
    return rest


def _copy_rest(source: Path, target: Path) -> None:
    """Tokenizer, generation config, chat template: whatever lies beside the weights."""
    for file in sorted(source.iterdir()):
        if (
            file.is_file()
            and file.suffix not in (".safetensors", ".bin", ".pt")
            and file.name not in (INDEX, "config.json")
        ):
            shutil.copyfile(file, target / file.name)
