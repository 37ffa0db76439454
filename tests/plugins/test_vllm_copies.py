"""Versions in an engine of several copies, of which vLLM answers for the first alone; workers without vLLM."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from prl.errors import InfrastructureError
from prl.serve.refusal import RefusedError
from prl.types import Manifest
from prl_disk.files import DiskReceiver, DiskSender
from prl_vllm.api import VllmApi
from prl_vllm.engine import Engine
from prl_vllm.inside.worker import Extension, Source

SHAPES = {"a": (5, 3)}


class Copies:
    """What vLLM makes of a call: it reaches every copy, the first one's result comes back, any one's failure does."""

    def __init__(self, run_dir: str, *folders: Path) -> None:
        self.workers = [Extension() for _ in folders]
        for worker, folder in zip(self.workers, folders, strict=True):
            source = Source(DiskReceiver(folder), on_device=False)
            worker.__dict__.update(device=torch.device("cpu"), prl_sources={run_dir: source})

    async def call(self, method: str, **arguments: Any) -> list[Any]:
        try:
            results = [getattr(worker, method)(**arguments) for worker in self.workers]
        except RuntimeError as error:
            raise InfrastructureError(str(error)) from error
        return results[:1]


def engine(api: Copies) -> Engine:
    return Engine(
        cast(VllmApi, api),
        run_dir="run",
        shapes=SHAPES,
        length=8,
        vocab_size=8,
        sequences=1,
        recompute=False,
        tells_versions=True,
    )


def sent(folder: Path) -> Manifest:
    return DiskSender(folder).send(3, [("a", torch.arange(15.0).reshape(5, 3))])


def test_a_version_that_one_copy_lacks_is_not_prepared(tmp_path: Path) -> None:
    manifest = sent(tmp_path / "first")

    async def prepare(*folders: str) -> None:
        await engine(Copies("run", *(tmp_path / folder for folder in folders))).prepare(manifest)

    asyncio.run(prepare("first", "first"))
    for folders in (("first", "second"), ("second", "first")):
        with pytest.raises(RefusedError, match=r"version 3 cannot be prepared: .* is not in .*second"):
            asyncio.run(prepare(*folders))
