"""Versions in an engine of several copies, of which vLLM answers for the first alone; workers without vLLM."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from prl.errors import InfrastructureError
from prl.serve.refusal import RefusedError
from prl.types import Manifest
from prl_disk.files import DiskReceiver, DiskSender
from prl_vllm.api import VllmApi
from prl_vllm.engine import Engine
from prl_vllm.inside.worker import Extension, Source, Staged

SHAPES = {"a": (5, 3)}


class Copies:
    """What vLLM makes of a call: it reaches every copy, the first one's result comes back, any one's failure does."""

    def __init__(self, run_dir: str, *folders: Path) -> None:
        self.workers = [Extension() for _ in folders]
        for worker, folder in zip(self.workers, folders, strict=True):
            source = Source(DiskReceiver(folder), on_device=False)
            runner = SimpleNamespace(get_model=lambda: torch.nn.Module())
            worker.__dict__.update(
                device=torch.device("cpu"), prl_sources={run_dir: source}, model_runner=runner, vllm_config=None
            )

    async def pause(self, *, clear_cache: bool) -> None:
        assert not clear_cache

    async def resume(self) -> None:
        """Nothing was computed."""

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


# --- reading back -----------------------------------------------------------------------------------------------------
SENT = 77


def read_back(copies: Copies, monkeypatch: pytest.MonkeyPatch, *served: dict[str, tuple[int, int]]) -> dict[str, int]:
    """The engine's page, where its copies serve that, name -> (checksum, elements), and were sent tensor `a`."""
    found = dict(zip(map(id, copies.workers), served, strict=True))
    for worker in copies.workers:
        worker.__dict__["prl_served"] = Staged(3, checksums={"a": SENT}, tensors={"a": torch.zeros(5, 3)})
    monkeypatch.setattr(
        "prl_vllm.inside.worker.checksums",
        lambda loader, tensors, names: [(name, *said) for name, said in found[id(loader.worker)].items()],
    )

    async def ask() -> dict[str, int]:
        return dict(await engine(copies).read_back())

    return asyncio.run(ask())


def test_every_copy_is_compared_with_what_was_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Copies("run", tmp_path, tmp_path)
    right, wrong = {"a": (SENT, 15)}, {"a": (SENT + 1, 15)}
    assert read_back(copies, monkeypatch, right, right) == {"a": SENT}
    for served in ((right, wrong), (wrong, right)):
        with pytest.raises(RefusedError, match=r"version 3 is not served as it was sent: 1 of 1 tensors .*, first a"):
            read_back(copies, monkeypatch, *served)


def test_a_tensor_must_be_served_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Copies("run", tmp_path)
    with pytest.raises(RefusedError, match="the workers serve 14 of the 15 elements of tensor a"):
        read_back(copies, monkeypatch, {"a": (SENT, 14)})
    assert read_back(copies, monkeypatch, {}) == {}
