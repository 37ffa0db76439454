"""What a policy version is made of, as one hash per version that holds all hashes before it.

    chain(v) = sha256(chain(v - 1), digest of v's published tensors, digest of the batch of step v)

A version is covered by the contents of every batch that led to it, in order, and by the checksums of every set of
weights that was published on the way. Every version has a link, published or not: where a step's weights were not
published (all but the last of a warm-up), the middle part is empty, and the next published version vouches for them,
since they are what it was trained from. The first version of a record has no batch; its parent is `GENESIS`, or the
chain of the checkpoint it continues from.

What a hash does not cover: the optimizer's state, the code, and the random numbers of the engines (training sees
their tokens and log-probabilities, which the batch holds). Tensor checksums are crc32: they tell accidents, not
forgery.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import attrs
import numpy as np
from numpy.typing import NDArray

from prl.types import Batch, ContextShard, Manifest, MicroBatch, Pieces

GENESIS = ""


class Hash(Protocol):
    """What hashlib's constructors return."""

    def update(self, data: Any, /) -> None: ...


def link(parent: str, manifest: str, batch: str) -> str:
    """The chain of a version, from its parent's and the digests of its tensors and its batch (hex, or empty)."""
    return hashlib.sha256(f"{parent}\n{manifest}\n{batch}".encode()).hexdigest()


def manifest_digest(manifest: Manifest | None) -> str:
    """Names, types, shapes and checksums of the tensors, by name; where they lie is left out. Empty for None."""
    if manifest is None:
        return ""
    tensors = sorted(manifest.tensors, key=lambda tensor: tensor.name)
    lines = (f"{t.name}\t{t.dtype}\t{t.shape}\t{t.checksum}\n" for t in tensors)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def batch_digest(batch: Batch) -> str:
    """Every column of every micro-batch of every rank, with names, types and shapes, after step and denominators."""
    head = f"{batch.step} {batch.version} {batch.phase} {sorted(batch.token_counts.items())}"
    digest = hashlib.sha256(head.encode())
    for rank, micro_batches in enumerate(batch.ranks):
        for number, micro_batch in enumerate(micro_batches):
            digest.update(f"\nrank {rank} micro-batch {number}\n".encode())
            _add_columns(digest, micro_batch)
    return digest.hexdigest()


def _add_columns(digest: Hash, micro_batch: MicroBatch) -> None:
    for field in attrs.fields(MicroBatch):
        value = getattr(micro_batch, field.name)
        for name, column in sorted(value.items()) if isinstance(value, Mapping) else [("", value)]:
            digest.update(f"{field.name} {name}\n".encode())
            for part in column if isinstance(column, tuple) else (column,):
                _add_column(digest, part)


def _add_column(digest: Hash, column: NDArray[Any] | Pieces | ContextShard | None) -> None:
    """A column that travels by reference counts with its checksums; where it rests does not."""
    if isinstance(column, np.ndarray):
        digest.update(f"{column.dtype.str} {column.shape}\n".encode())
        digest.update(np.ascontiguousarray(column).data)
    elif isinstance(column, ContextShard):
        digest.update(f"{column}\n".encode())
    elif column is not None:
        pieces = "".join(f"{piece.dtype} {piece.shape} {piece.checksum}\n" for piece in column)
        digest.update((pieces or "none\n").encode())
