"""One cluster for the tests of this folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, cluster, unavailable


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """Five idle nodes of eight GPUs; skips where there can be none."""
    if reason := unavailable():
        pytest.skip(reason)
    # Sockets have short names: pytest's own folders are too deep.
    with tempfile.TemporaryDirectory(prefix="prl-slurm-") as folder, cluster(Path(folder) / "slurm") as up:
        yield up
