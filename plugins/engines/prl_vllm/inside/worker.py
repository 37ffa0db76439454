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
        receiver = _receiver(self.__dict__, run_dir)
        staged.thread = threading.Thread(target=_fetch, args=(staged, receiver, _manifest(manifest)), daemon=True)
        self.__dict__["prl_staged"] = staged
        staged.thread.start()
        return {}

    def prl_prepared(self, version: int) -> dict[str, Any]:
        """`done`, and the sentence in `error` when it cannot be used."""
        staged: Staged | None = self.__dict__.get("prl_staged")
        if staged is None or staged.version != version:
            return {"done": True, "error": f"version {version} was never asked for"}
        return {"done": staged.thread is None or not staged.thread.is_alive(), "error": staged.error}

    def prl_commit(self, version: int) -> dict[str, Any]:
        """Load a prepared version; called while the server is paused. Raises when it cannot, on any rank.

        What was served before is kept, for `prl_restore`, until the next version is prepared.
        """
        staged: Staged | None = self.__dict__.get("prl_staged")
        if staged is None or staged.version != version:
            raise RuntimeError(f"version {version} is not prepared")
        assert staged.thread is not None
        staged.thread.join()
        if staged.tensors is None:
            raise RuntimeError(staged.error)
        started = time.perf_counter()
        Loader(self).load(staged.tensors)
        self.__dict__["prl_served"] = staged
        return {"seconds": time.perf_counter() - started, "tensors": len(staged.tensors)}

    def prl_restore(self) -> dict[str, Any]:
        """Load what was served before a commit that failed half-way."""
        served: Staged | None = self.__dict__.get("prl_served")
        if served is None or served.tensors is None:
            raise RuntimeError("no version was served before")
        Loader(self).load(served.tensors)
        return {"version": served.version}

    def prl_read_back(self, names: list[str]) -> dict[str, Any]:
        """Name -> checksum of what the served weights hold of a tensor, as the trainer computes it; all for no names.

        For tests and inspection: it costs several times the size of the largest layer.
        """
        served: Staged | None = self.__dict__.get("prl_served")
        if served is None or served.tensors is None:
            raise RuntimeError("nothing was committed yet")
        return dict(checksums(Loader(self), served.tensors, frozenset(names)))


def _receiver(worker: dict[str, Any], run_dir: str) -> WeightReceiver:
    """The run's weight transport, engine side; built once for each run directory."""
    known: dict[str, WeightReceiver] = worker.setdefault("prl_receivers", {})
    if run_dir not in known:
        composition = open_run(RunDir(Path(run_dir)))
        provider = composition.provider(composition.run.weights)
        receive = composition.load(provider.receive)  # type: ignore[attr-defined]
        known[run_dir] = receive(composition.run.weights, Path(run_dir))
    return known[run_dir]


def _manifest(fields: Mapping[str, Any]) -> Manifest:
    """From JSON, as strictly as from any wire."""
    manifest: Manifest = wire.decode([msgpack.packb([Manifest.__name__, fields])], (Manifest,))
    return manifest


def _fetch(staged: Staged, receiver: WeightReceiver, manifest: Manifest) -> None:
    """In a thread of its own. Whatever is wrong with the version is the trainer's to know, never this process's end."""
    try:
        staged.tensors = dict(receiver.fetch(manifest))
    except Exception as error:
        staged.error = f"{error}"
