"""The part of prl in a vLLM worker: fetches a version beside the one being served, loads it, and reads it back.

Mixed into vLLM's worker by `--worker-extension-cls`; every method is reached by name over `collective_rpc`, with JSON
in and JSON out. `prl_prepare` starts a thread, so that generation goes on; the others run between two steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import msgpack  # type: ignore[import-untyped]
import torch
from prl import wire
from prl.compose.compose import open_run
from prl.providers import WeightReceiver
from prl.run_dir import RunDir
from prl.types import Manifest
from torch import Tensor

from prl_vllm.inside import PROTOCOL
from prl_vllm.inside.loading import Loader
from prl_vllm.inside.read_back import checksums
from prl_vllm.release import tells_versions


@attrs.define(eq=False)
class Staged:
    """A version on its way in."""

    version: int
    thread: threading.Thread | None = None
    tensors: dict[str, Tensor] | None = None
    """In host memory."""
    on_device: dict[str, Tensor] | None = None
    """The same until it is loaded, where the run stages versions on the device."""
    error: str = ""


class Extension:
    """Methods of every worker of a server that serves a run. vLLM's worker is `self`."""

    def prl_describe(self) -> dict[str, Any]:
        """Who is here."""
        import vllm

        return {"protocol": PROTOCOL, "vllm": vllm.__version__, "tells_versions": tells_versions()}

    def prl_prepare(self, run_dir: str, manifest: dict[str, Any]) -> dict[str, Any]:
        """Begin to fetch and verify a version; `prl_prepared` says how it went."""
        staged = Staged(int(manifest["version"]))
        source = _source(self.__dict__, run_dir)
        arguments = (staged, source, _manifest(manifest), self.__dict__["device"])
        staged.thread = threading.Thread(target=_fetch, args=arguments, daemon=True)
        self.__dict__["prl_staged"] = staged
        staged.thread.start()
        return {}

    def prl_prepared(self, version: int) -> dict[str, Any]:
        """`done`, and the sentence in `error` when it cannot be used."""
        staged: Staged | None = self.__dict__.get("prl_staged")
        if staged is None or staged.version != version:
            return {"done": True, "error": f"version {version} was never asked for"}
        return {"done": staged.thread is None or not staged.thread.is_alive(), "error": staged.error}

    def prl_ready(self, version: int) -> dict[str, Any]:
        """Wait until it is prepared; raises when it cannot be used.

        vLLM carries calls to all data-parallel copies and answers with what the first one's workers return, or with the
        failure of any: what has to be known of every copy is raised.
        """
        staged: Staged | None = self.__dict__.get("prl_staged")
        if staged is None or staged.version != version:
            raise RuntimeError(f"version {version} was never asked for")
        if staged.thread is not None:
            staged.thread.join()
        if staged.error:
            raise RuntimeError(staged.error)
        return {}

    def prl_commit(self, version: int) -> dict[str, Any]:
        """Load a prepared version; called while the server is paused. Raises when it cannot, on any rank.

        What was served before is kept, for `prl_restore`, until the next version is prepared.
        """
        self.prl_ready(version)
        staged: Staged = self.__dict__["prl_staged"]
        assert staged.tensors is not None
        started = time.perf_counter()
        Loader(self).load(staged.on_device or staged.tensors)
        staged.on_device = None
        self.__dict__["prl_served"] = staged
        return {"seconds": time.perf_counter() - started, "tensors": len(staged.tensors)}

    def prl_restore(self) -> dict[str, Any]:
        """Load what was served before a commit that failed half-way."""
        served: Staged | None = self.__dict__.get("prl_served")
        if served is None or served.tensors is None:
            raise RuntimeError("no version was served before")
        Loader(self).load(served.tensors)
        return {"version": served.version}

    def prl_release(self, requests: list[str]) -> dict[str, Any]:
        """Let prompts go that are kept for other engines; nobody may have begun to fetch them."""
        from prl_vllm.inside import kept

        kept.release(requests)
        return {}

    def prl_read_back(self, names: list[str]) -> dict[str, Any]:
        """Name -> checksum of what the served weights hold of a tensor, as the trainer computes it; all for no names.

        For tests and inspection: it costs several times the size of the largest layer.
        """
        served: Staged | None = self.__dict__.get("prl_served")
        if served is None or served.tensors is None:
            raise RuntimeError("nothing was committed yet")
        return dict(checksums(Loader(self), served.tensors, frozenset(names)))


@attrs.frozen(eq=False)
class Source:
    """Where a run's versions come from."""

    receiver: WeightReceiver
    """The run's weight transport, engine side."""
    on_device: bool
    """They are staged there."""


def _source(worker: dict[str, Any], run_dir: str) -> Source:
    """Built once for each run directory."""
    known: dict[str, Source] = worker.setdefault("prl_sources", {})
    if run_dir not in known:
        composition = open_run(RunDir(Path(run_dir)))
        run = composition.run
        receive = composition.load(composition.provider(run.weights).receive)  # type: ignore[attr-defined]
        staging = getattr(run.engine, "staging", "host")
        known[run_dir] = Source(receive(run.weights, Path(run_dir)), staging == "device")
    return known[run_dir]


def _manifest(fields: Mapping[str, Any]) -> Manifest:
    """From JSON, as strictly as from any wire."""
    manifest: Manifest = wire.decode([msgpack.packb([Manifest.__name__, fields])], (Manifest,))
    return manifest


def _fetch(staged: Staged, source: Source, manifest: Manifest, device: torch.device) -> None:
    """In a thread of its own. Whatever is wrong with the version is the trainer's to know, never this process's end."""
    try:
        if device.type != "cpu":
            torch.accelerator.set_device_index(device.index)  # each thread has one of its own
        tensors = dict(source.receiver.fetch(manifest))
        if source.on_device:
            staged.on_device = _copied(tensors, device)
        staged.tensors = tensors
    except Exception as error:
        staged.error = f"{error}"


def _copied(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """On a stream of their own: what is computed meanwhile does not wait for the copies."""
    stream = torch.Stream(device=device)
    with stream:
        copies = {name: tensor.to(device) for name, tensor in tensors.items()}
    stream.synchronize()
    return copies
