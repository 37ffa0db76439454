"""What an update costs by transport, without a run: a trainer's rank on one GPU, an engine's worker on another.

    python -m benchmarks.weight_transports_gpu --out DIR             8.3 GB on two GPUs, two minutes
    python -m benchmarks.weight_transports_gpu --out DIR --gb 0.02   on a CPU

The rank sends versions of a mixture of experts in bfloat16; the worker prepares them by the code of vLLM's worker, for
both kinds of staging, and copies what it staged over what it has (`commit`: less than vLLM's own loaders do). Then the
parts of a prepare are timed apart: joining the rank, moving bytes, checksums, copies between host and device. Beside
them what the machine does: copies over the bus and from GPU to GPU. DIR/weight_transports.json is written after each
part, and one that fails costs no other.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import time
import traceback
import zlib
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from prl.compose.compose import compose, create_run
from prl.compose.config import WeightTransportConfig
from prl.providers import WeightReceiver, WeightSender
from prl.types import Manifest
from prl.weights import crc
from prl.weights.host_memory import HostMemory
from prl.weights.tensors import tensor_bytes
from prl_local.devices import found
from prl_nccl import NcclConfig, receiver, sender
from prl_nccl.pair import device_here
from prl_shared_memory import SharedMemoryConfig, segments
from prl_vllm.inside.worker import Source, Staged, fetch
from torch import Tensor

from benchmarks.sides import Side, say
from benchmarks.vllm_gpu import ROOT

HIDDEN, FEED, EXPERTS, VOCABULARY = 2048, 1024, 32, 151_936
LAYERS = 16
GIGABYTES = 8.3
VERSIONS = {"nccl": 4, "shared_memory": 2}
"""The first two of `nccl` find no memory pinned yet."""
KILLED_AFTER = 0.15
"""Seconds after which the rank goes."""
CONFIGS: dict[str, WeightTransportConfig] = {
    "nccl": NcclConfig(deadline=25.0),
    "shared_memory": SharedMemoryConfig(),
    "shared_memory, device": SharedMemoryConfig(memory="device"),
}
MODULES: dict[str, Any] = {name: (sender, receiver) if name == "nccl" else (segments, segments) for name in CONFIGS}


def weights(gigabytes: float) -> dict[str, Tensor]:
    """About so many, on this process's device; those of one size in one piece of memory."""
    device = device_here()
    scale = (gigabytes / GIGABYTES) ** 0.5
    hidden, feed, vocabulary = (max(16, int(size * scale)) for size in (HIDDEN, FEED, VOCABULARY))
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (2 * hidden, hidden) for name in "qo"}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (hidden // 4, hidden) for name in "kv"}
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes[f"{prefix}mlp.gate.weight"] = (EXPERTS, hidden)
        for expert in range(EXPERTS):
            for name, shape in {"gate": (feed, hidden), "up": (feed, hidden), "down": (hidden, feed)}.items():
                shapes[f"{prefix}mlp.experts.{expert}.{name}_proj.weight"] = shape
    return {name: torch.randn(shape, device=device, dtype=torch.bfloat16) for name, shape in shapes.items()}


def half(name: str) -> bool:
    """What one of two workers has under expert parallelism."""
    _, found, rest = name.partition(".experts.")
    return not found or int(rest.split(".")[0]) < EXPERTS // 2


# --- the two sides ----------------------------------------------------------------------------------------------------
class Rank:
    """Sends versions when it is told to."""

    def __init__(self, run: Path, gigabytes: float) -> None:
        self.run = run
        use_gpu()
        self.weights = weights(gigabytes)
        self.senders: dict[str, WeightSender] = {}

    def send(self, transport: str, version: int) -> dict[str, Any]:
        if transport not in self.senders:
            self.senders[transport] = MODULES[transport][0].send(CONFIGS[transport], self.run, 0)
        self.weights["model.embed_tokens.weight"][version] = version
        synchronize()
        started = time.perf_counter()
        manifest = self.senders[transport].send(version, self.weights.items())
        seconds = time.perf_counter() - started
        (self.run / f"{transport}-{version}").write_bytes(pickle.dumps(manifest))
        return {"write": seconds, "bytes": manifest.nbytes, "tensors": len(manifest.tensors)}

    def retire(self, transport: str, version: int) -> dict[str, Any]:
        self.senders[transport].retire(version)
        return {}

    def damage(self, transport: str, version: int) -> dict[str, Any]:
        """Change a byte of what waits on the device."""
        held: Any = self.senders[transport]
        _, room = held._held[version]
        room.segments[len(room.segments) // 2].content[100] ^= 1
        synchronize()
        return {}

    def memory(self) -> dict[str, Any]:
        return memory()


class Worker:
    """Prepares and commits when it is told to."""

    def __init__(self, run: Path, gigabytes: float) -> None:
        self.run = run
        use_gpu()
        self.served = weights(gigabytes)
        self.receivers: dict[str, WeightReceiver] = {}

    def manifest(self, transport: str, version: int) -> Manifest:
        manifest: Manifest = pickle.loads((self.run / f"{transport}-{version}").read_bytes())
        return manifest

    def update(self, transport: str, version: int, staging: str, part: str) -> dict[str, Any]:
        manifest = self.manifest(transport, version)
        if part == "half":
            manifest = manifest.only(half)
        if transport not in self.receivers:
            self.receivers[transport] = MODULES[transport][1].receive(CONFIGS[transport], self.run)
        staged = Staged(version)
        started = time.perf_counter()
        fetch(staged, Source(self.receivers[transport], staging == "device"), manifest, device_here())
        prepared = time.perf_counter()
        if staged.error:
            return {"error": staged.error, "seconds": prepared - started}
        tensors = staged.on_device or staged.tensors or {}
        synchronize()
        begun = time.perf_counter()
        for name, tensor in tensors.items():
            self.served[name].copy_(tensor, non_blocking=True)
        synchronize()
        committed = time.perf_counter()
        served = crc.of_tensors([self.served[record.name] for record in manifest.tensors])
        gigabytes = manifest.nbytes / 1e9
        return {
            "gigabytes": gigabytes,
            "prepare": prepared - started,
            "gigabytes_per_second": gigabytes / (prepared - started),
            "commit": committed - begun,
            "right": served == [record.checksum for record in manifest.tensors],
        }

    def memory(self) -> dict[str, Any]:
        return memory()

    def nccl_parts(self, version: int, channels: int) -> dict[str, Any]:
        """Joining the rank and moving the bytes, without looking at them; what a group takes of the device."""
        manifest = self.manifest("nccl", version)
        made = receiver.receive(CONFIGS["nccl"], self.run)
        before = memory()["besides"]
        (part,) = manifest.parts
        rounds = []
        for _ in range(2):
            fetch = receiver.Fetch(version, time.monotonic() + 30, channels=channels)
            started = time.perf_counter()
            lots = receiver.lots_of(part)
            link = made._ask(part.location, lots, fetch)
            joined = time.perf_counter()
            ahead: deque[Any] = deque()
            for lot in lots:
                ahead.append(link.pair.post(lot.start, lot.end))
                if len(ahead) > 4:
                    waited(link, ahead.popleft(), fetch.deadline)
            while ahead:
                waited(link, ahead.popleft(), fetch.deadline)
            moved = time.perf_counter()
            made._keep(link)
            rounds.append({"join": joined - started, "move": moved - joined})
        after = memory()["besides"]
        made.close()
        return {"rounds": rounds, "device_memory_of_a_group": after - before}

    def joins(self, version: int, count: int = 3) -> dict[str, Any]:
        """Seconds of making one group and ending it."""
        (part,) = self.manifest("nccl", version).parts
        made = receiver.receive(CONFIGS["nccl"], self.run)
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            link = made._connected(part.location, receiver.Fetch(version, time.monotonic() + 30))
            joined = time.perf_counter()
            link.close()
            seconds.append({"make": joined - started, "end": time.perf_counter() - joined})
        return {"seconds": seconds}

    def local_parts(self, version: int) -> dict[str, Any]:
        """Checksums on the device and on the host, copies of all tensors each way."""
        tensors = list(self.served.values())
        gigabytes = sum(tensor.nbytes for tensor in tensors) / 1e9
        figures: dict[str, Any] = {"gigabytes": gigabytes}
        if torch.cuda.is_available():
            figures["checksums_on_device"] = [timed(lambda: crc.of_tensors(tensors)) for _ in range(3)]
            figures["to_pinned"] = timed(partial(kept, HostMemory(pinned=True), tensors))
            copies = kept(HostMemory(pinned=True), tensors[:64])
            agree = crc.of_tensors(tensors[:64]) == [zlib.crc32(tensor_bytes(copy)) for copy in copies]
            figures["checksums_of_device_and_host_agree"] = agree
            figures["from_pinned_64_tensors"] = {
                "gigabytes": sum(copy.nbytes for copy in copies) / 1e9,
                "seconds": timed(lambda: [copy.to("cuda", non_blocking=True) for copy in copies]),
            }
        shared = self.manifest("shared_memory", version)
        receive = segments.receive(SharedMemoryConfig(), self.run)
        figures["shared_memory_checksums"] = [timed(lambda: deque(receive.fetch(shared), 0)) for _ in range(2)]
        mapped = dict(receive.fetch(shared))
        figures["shared_memory_to_device"] = timed(lambda: [t.to(device_here()) for t in mapped.values()])
        return figures


def waited(link: Any, posted: tuple[Tensor, list[Any]], deadline: float) -> None:
    for work in posted[1]:
        link.pair.wait(work, deadline)


def kept(memory: HostMemory, tensors: list[Tensor]) -> list[Tensor]:
    return [memory.keep(tensor) for tensor in tensors]


def use_gpu() -> None:
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], Any]) -> float:
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def memory() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"besides": 0}
    free, total = torch.cuda.mem_get_info()
    return {"free": free, "besides": total - free - torch.cuda.memory_reserved()}


def physical() -> dict[str, Any]:
    """Copies of a gigabyte over the bus and between two GPUs, in GB/s."""
    if torch.cuda.device_count() < 2:
        return {}
    size = 1 << 30
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    plain = torch.empty(size, dtype=torch.uint8)
    first, second = (torch.empty(size, dtype=torch.uint8, device=f"cuda:{index}") for index in range(2))
    ways = {
        "to_pinned": lambda: pinned.copy_(first),
        "from_pinned": lambda: first.copy_(pinned),
        "to_plain": lambda: plain.copy_(first),
        "from_plain": lambda: first.copy_(plain),
        "from_gpu_to_gpu": lambda: second.copy_(first),
        "on_one_gpu": lambda: first.clone(),
    }
    speeds = {}
    for name, way in ways.items():
        timed(way)
        speeds[name] = size / min(timed(way) for _ in range(3)) / 1e9
    return {
        **speeds,
        "pinning": size / timed(lambda: torch.empty(2 * size, dtype=torch.uint8, pin_memory=True)) * 2 / 1e9,
    }


# --- processes --------------------------------------------------------------------------------------------------------
def serve(side: Rank | Worker) -> None:
    """Do what is asked on the standard input, one line of JSON each."""
    say(ready=True)
    for line in sys.stdin:
        what = json.loads(line)
        try:
            say(**getattr(side, what.pop("do"))(**what))
        except Exception as error:
            traceback.print_exc()
            say(error=f"{type(error).__name__}: {error}"[:500])


class Asked(Side):
    """One of the two processes."""

    def __init__(self, side: str, run: Path, gigabytes: float, device: str) -> None:
        words = ["benchmarks.weight_transports_gpu", "--out", str(run), "--gb", str(gigabytes), "--side", side]
        super().__init__(words, device)

    def begin(self, do: str, **what: Any) -> None:
        self.tell(json.dumps({"do": do, **what}))

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        self.begin(do, **what)
        return self.heard()


@attrs.frozen
class Report:
    """What is known so far, on disk too."""

    file: Path
    figures: dict[str, Any] = attrs.field(factory=dict)

    def add(self, name: str, value: Any) -> None:
        self.figures[name] = value
        print(f"{time.strftime('%X')} {name}: {json.dumps(value)}", flush=True)
        self.file.write_text(json.dumps(self.figures, indent=1) + "\n")


def measure(run: Path, gigabytes: float, report: Report) -> None:
    first, second = (*found(), "", "")[:2] if len(found()) != 1 else (found()[0],) * 2
    rank, worker = (Asked(side, run, gigabytes, device) for side, device in (("rank", first), ("worker", second)))
    try:
        report.add("physical", physical())  # while the two start
        for side in (rank, worker):
            side.heard()
        for transport, versions in VERSIONS.items():
            updates(rank, worker, transport, versions, report)
        report.add("parts", worker.ask("local_parts", version=VERSIONS["shared_memory"] - 1))
        version = VERSIONS["nccl"] - 1
        nccl_parts(worker, version, report)
        worker.begin("update", transport="nccl", version=version, staging="device", part="all")
        time.sleep(KILLED_AFTER)
        rank.end()
        report.add("nccl/rank killed", worker.heard())
    finally:
        rank.end()
        worker.end()


def updates(rank: Asked, worker: Asked, transport: str, versions: int, report: Report) -> None:
    """As in a run: when a version is served, the one before it goes."""
    writes = []
    for version in range(versions):
        writes.append(rank.ask("send", transport=transport, version=version))
        rank.ask("retire", transport=transport, version=version - 1)
    report.add(f"{transport}/write", writes)
    for staging, part in (("host", "all"), ("device", "all"), ("device", "half")):
        question = {"transport": transport, "version": versions - 1, "staging": staging, "part": part}
        report.add(f"{transport}/{staging}/{part}", [worker.ask("update", **question) for _ in range(3)])


def nccl_parts(worker: Asked, version: int, report: Report) -> None:
    report.add("nccl/joins", worker.ask("joins", version=version))
    for channels in (1, 2, 4):
        report.add(f"nccl/parts/{channels} channels", worker.ask("nccl_parts", version=version, channels=channels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--gb", type=float, default=GIGABYTES, help="gigabytes of weights")
    parser.add_argument("--side", choices=("rank", "worker"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve({"rank": Rank, "worker": Worker}[options.side](options.out, options.gb))
        return
    folder = options.out.resolve()
    config = ROOT / "configs" / "spell_backward.toml"
    overrides = [f'run.dir="{folder / "transports-run"}"', 'weights.type="nccl"']
    run_dir = create_run(compose(config, plugins="nccl", overrides=overrides, probe=False), config)
    measure(run_dir.path, options.gb, Report(folder / "weight_transports.json"))


if __name__ == "__main__":
    main()
