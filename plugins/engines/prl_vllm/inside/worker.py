"""The part of prl in a vLLM worker: fetches a version beside the one being served, loads it, and reads it back.

Mixed into vLLM's worker by `--worker-extension-cls`; every method is reached by name over `collective_rpc`, with JSON
in and JSON out. `prl_prepare` starts a thread, so that generation goes on; the others run between two steps.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
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
from prl.weights.host_memory import HostMemory, Landing
from torch import Tensor

from prl_vllm.inside import PROTOCOL
from prl_vllm.inside.loading import Loader
from prl_vllm.inside.read_back import checksums
from prl_vllm.inside.wanted import wanted
from prl_vllm.release import tells_versions


@attrs.define(eq=False)
class Staged:
    """A version on its way in."""

    version: int
    thread: threading.Thread | None = None
    checksums: dict[str, int] = attrs.field(factory=dict)
    """Of what the trainer sent, by name."""
    tensors: dict[str, Tensor] | None = None
    """Those that this worker loads, in host memory."""
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
        loader = Loader(self)
        version = _manifest(manifest).only(wanted(loader.model, loader.config))
        arguments = (staged, source, version, self.__dict__["device"])
        staged.thread = threading.Thread(target=fetch, args=arguments, daemon=True)
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
        """Name -> checksum, and number of elements that this worker serves, of these tensors; of all for no names.

        Raises when any is not what the trainer sent: that has to be known of every copy. For tests and inspection: it
        costs several times the size of the largest layer.
        """
        served: Staged | None = self.__dict__.get("prl_served")
        if served is None or served.tensors is None:
            raise RuntimeError("nothing was committed yet")
        found = {
            name: (checksum, elements)
            for name, checksum, elements in checksums(Loader(self), served.tensors, frozenset(names))
        }
        if wrong := [name for name, (checksum, _) in found.items() if checksum != served.checksums[name]]:
            raise RuntimeError(
                f"version {served.version} is not served as it was sent: {len(wrong)} of {len(found)} tensors differ "
                f"in the worker of process {os.getpid()}, first {wrong[0]}"
            )
        return found


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


def fetch(staged: Staged, source: Source, manifest: Manifest, device: torch.device) -> None:
    """In a thread of its own. Whatever is wrong with the version is the trainer's to know, never this process's end."""
    try:
        if device.type != "cpu":
            torch.accelerator.set_device_index(device.index)  # each thread has one of its own
            stream: AbstractContextManager[Any] = torch.Stream(device=device)  # what is computed waits for no copy
        else:
            stream = nullcontext()
        staged.checksums = {record.name: record.checksum for record in manifest.tensors}
        on_host, on_device = {}, {}
        landing = Landing(HostMemory(pinned=True), device) if device.type == "cuda" else None
        for name, tensor in source.receiver.fetch(manifest):
            with stream:
                if source.on_device:
                    on_device[name] = tensor.to(device)
            on_host[name] = landing.keep(tensor) if landing is not None and tensor.is_cuda else tensor.cpu()
        if landing is not None:
            landing.finish()
        staged.tensors = on_host
        staged.on_device = on_device or None
    except Exception as error:
        staged.error = f"{error}"
