"""The parts of benchmarks/vllm_two_gpus.py that are one process each; each writes OUT/NAME.json as it goes."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from prl.compose.compose import compose, create_run
from prl.compose.toml import dumps
from prl.types import Manifest
from prl_local.devices import found

from benchmarks.vllm_gpu import ROOT, write_prompts
from benchmarks.vllm_kv import Talk, measure
from benchmarks.vllm_two_gpus_fleet import Fleet
from benchmarks.vllm_two_gpus_routes import routes
from tests.plugins.served_vllm import Background, Served, k3

KV_TOKEN_BYTES = 8 * 2 * 4 * 128 * 2
"""Of the GPUs' model: 8 layers, keys and values, 4 heads of 128, bfloat16."""


@attrs.frozen(kw_only=True)
class Sizes:
    device: str
    model: Mapping[str, Any]
    quantization: str
    length: int
    talk: Talk
    room: int
    """Bytes of a cache. Said, not measured: there are other servers on the device."""
    small: int
    """Of a small cache, and of the host memory behind it."""
    cold: tuple[int, int]
    """Prompts, and their tokens, that nobody computed before."""
    options: Mapping[str, Any]
    environment: Mapping[str, str]
    ready: float
    """Seconds until all servers must be there."""


GPU = Sizes(
    device="cuda",
    model={
        "hidden_size": 1024,
        "layers": 8,
        "heads": 16,
        "kv_heads": 4,
        "head_dim": 128,
        "experts": 16,
        "experts_per_token": 4,
        "expert_intermediate_size": 512,
    },
    quantization="bf16",
    length=4608,
    talk=Talk(conversations=8, turn=2000, sampled=16),
    room=2 << 30,
    small=3 * 4096 * KV_TOKEN_BYTES,
    cold=(12, 4096),
    options={"gpu_memory_utilization": 0.1, "enforce_eager": True},
    environment={"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0"},
    ready=200.0,
)
TOY = Sizes(
    device="cpu",
    model={
        "layers": 2,
        "experts": 8,
        "experts_per_token": 2,
        "expert_intermediate_size": 64,
    },
    quantization="fp32",
    length=1024,
    talk=Talk(conversations=3, turn=300, sampled=8),
    room=128 << 20,
    small=12 * (128 << 10),
    cold=(2, 300),
    options={},
    environment={},
    ready=600.0,
)


# --- files ------------------------------------------------------------------------------------------------------------
def write_base(folder: Path, sizes: Sizes) -> Path:
    """The config that all parts change."""
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder / "prompts.jsonl")
    reward = f"{ROOT}/benchmarks/vllm_gpu.py:even_digits"
    path = folder / "base.toml"
    table = {
        "extends": f"{ROOT}/configs/toy.toml",
        "run": {"steps": 1},
        "plugins": ["functions", "vllm", "disk", "fp8_block"],
        "tokenizer": {"characters": "\n ()-:>ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"},
        "environments": [{"type": "functions", "name": "digits", "file": f"{folder}/prompts.jsonl", "reward": reward}],
        "model": dict(sizes.model),
        "trainer": {"device": sizes.device},
        "quantization": {"type": sizes.quantization},
        "rollouts": {"max_tokens": 32, "sequence_length": 96},
        "engine": {
            "type": "vllm",
            "sequences": 16,
            "length": sizes.length,
            "kv_cache_bytes": sizes.room,
            "options": dict(sizes.options),
            "environment": dict(sizes.environment),
        },
    }
    path.write_text(dumps(table))
    return path


class Report:
    """What a part found so far, in its file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {}

    def add(self, **found: Any) -> None:
        self._found |= found
        self._path.write_text(json.dumps(self._found, indent=1) + "\n")
        print(json.dumps(found)[:2000], flush=True)

    def exit_code(self, part: Callable[[], object]) -> int:
        """Of a process that does this alone; what it failed of is in the file."""
        try:
            part()
        except Exception as error:
            traceback.print_exc()
            self.add(error=f"{type(error).__name__}: {error}"[:1500])
            return 1
        return 0


@attrs.frozen(kw_only=True)
class Job:
    """What every part is given."""

    name: str
    folder: Path
    sizes: Sizes
    invariant: bool
    report: Report
    background: Background
    only: tuple[str, ...] = ()
    """Layouts; empty: all."""

    @contextmanager
    def up(self, layouts: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Fleet]]:
        """The engines of each layout, all started at once; their first version is not published. Of layouts whose
        engines do not come the report says why."""
        started = time.monotonic()
        base = write_base(self.folder / self.name, self.sizes)
        exact = ['engine.environment.VLLM_BATCH_INVARIANT="1"'] if self.invariant else []
        devices = found()
        with ExitStack() as stack:
            fleets = {}
            for name, edits in layouts.items():
                if self.only and name not in self.only:
                    continue
                place = self.folder / self.name / f"{name.replace(' ', '-')}{'' if self.invariant else '-as-it-comes'}"
                fleets[name] = stack.enter_context(
                    Fleet.started(self.background, base, place, [*exact, *edits], devices)
                )
            deadline = started + self.sizes.ready
            for name, fleet in list(fleets.items()):
                try:
                    fleet.wait(max(deadline - time.monotonic(), 1.0))
                except RuntimeError as error:
                    if len(fleets) == 1:
                        raise
                    self.report.add(**{f"absent: {name}": str(error)})
                    del fleets[name]
            self.report.add(ready_after=round(time.monotonic() - started, 1))
            yield fleets


# --- keys and values --------------------------------------------------------------------------------------------------
def kv(job: Job) -> None:
    """Tokens, log-probabilities and routes beside the plain server's; hits and bytes; what a hand-over takes."""
    small, talk = job.sizes.small, job.sizes.talk
    routed = 'trainer.router_replay="on"'
    prefill = ("engine.count=2", "engine.prefill.count=1", 'engine.environment.UCX_PROTO_INFO="y"')

    def tiers(name: str) -> tuple[str, ...]:
        disk = job.folder / job.name / f"disk-{name}"
        return (
            routed,
            f"engine.kv_cache_bytes={small}",
            f"engine.kv_tiers.host_bytes={small}",
            f'engine.kv_tiers.disk="{disk}"',
        )

    layouts = {
        "plain": (routed,),
        "prefill and decode": (routed, *prefill),
        "tiers": tiers("alone"),
        "prefill and decode, tiers": (*prefill, *tiers("both")),
    }
    with job.up(layouts) as fleets:
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda fleet: fleet.publish(0, seed=1), fleets.values()))
        job.report.add(prefix_noise=_again(fleets["plain"].engines[0], talk))
        reference = None
        rows = []
        for name, fleet in fleets.items():
            try:
                row, answers = measure(name, fleet.engines, talk, reference)
            except Exception as error:  # one layout that fails leaves the others
                rows.append({"layout": name, "error": f"{type(error).__name__}: {error}"})
                job.report.add(layouts=rows)
                continue
            reference = reference or answers
            disk = sum(f.stat().st_size for f in (job.folder / job.name).glob("disk-*/**/*") if f.is_file())
            rows.append({**attrs.asdict(row), "bytes_on_disk": disk})
            job.report.add(layouts=rows)
        plain, handed = fleets["plain"].engines[0], fleets["prefill and decode"].engines[-1]
        job.report.add(hand_over=hand_over(job.sizes, plain, handed), transfers=_told(job.folder / job.name))
        for name in ("plain", "prefill and decode"):
            fleets[name].publish(1, seed=2)
        row, answers = measure("plain, new weights", fleets["plain"].engines, talk, None)
        row, _ = measure("prefill and decode, new weights", fleets["prefill and decode"].engines, talk, answers)
        job.report.add(after_update=attrs.asdict(row))


def _again(engine: Served, talk: Talk) -> dict[str, Any]:
    """What one server's cache changes by itself: prompts asked cold, and again."""
    prompts = engine.prompts(*[talk.turn] * 4, seed=9)
    cold = [engine.generate(p, temperature=0.0, max_tokens=talk.sampled)[0] for p in prompts]
    warm = [engine.generate(p, temperature=0.0, max_tokens=talk.sampled)[0] for p in prompts]
    return {
        "completions": len(prompts),
        "differing": sum(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(cold, warm, strict=True)),
        "logprob_gap_of_first": max(float(abs(a.logprobs[0] - b.logprobs[0])) for a, b in zip(cold, warm, strict=True)),
    }


def hand_over(sizes: Sizes, plain: Served, handed: Served) -> dict[str, Any]:
    """Seconds to the first token of prompts that nobody computed before, one at a time; medians."""
    count, length = sizes.cold
    figures: dict[str, Any] = {"prompts": count, "tokens": length}
    before = handed.statistics()
    for name, engine in (("plain", plain), ("handed", handed)):
        seconds = []
        for prompt in engine.prompts(*[length] * (count + 2), seed=21):
            started = time.perf_counter()
            engine.generate(prompt, temperature=0.0, max_tokens=1)
            seconds.append(time.perf_counter() - started)
        figures[f"{name}_seconds"] = statistics.median(seconds[2:])
        figures[f"{name}_least"] = min(seconds[2:])
        figures[f"{name}_most"] = max(seconds[2:])
    after = handed.statistics()
    figures["bytes_of_each"] = (after["fetched_bytes"] - before["fetched_bytes"]) / (count + 2)
    return figures


def _told(folder: Path) -> list[str]:
    """What vLLM says of its transfers."""
    return [
        line.strip()[-400:]
        for log in sorted(folder.glob("**/*.log"))
        for line in log.read_text(errors="replace").splitlines()
        if "KV Transfer metrics" in line
    ][-6:]


# --- weights ----------------------------------------------------------------------------------------------------------
def fp8(job: Job, *edits: str) -> None:
    """Updates in FP8 blocks, read back; and how far what is sampled lies from the trainer's modules."""
    layout = ('quantization.type="fp8_block"', "engine.length=2048", *edits)
    with job.up({"engine": layout}) as fleets:
        fleet = fleets["engine"]
        fleet.round()
        for version in (0, 1):
            started = time.perf_counter()
            manifest = fleet.publish(version, seed=1 + version)
            figures = {"publish_seconds": time.perf_counter() - started, **mismatch(fleet)}
            job.report.add(**{f"version_{version}": figures})
            job.report.add(**{f"version_{version}": {**figures, **same(manifest, fleet)}})


def deep_gemm(job: Job) -> None:
    """As `fp8`; scales stay numbers of float32, so that what is served is what was sent."""
    fp8(
        job,
        'engine.environment.VLLM_USE_DEEP_GEMM="1"',
        'engine.environment.VLLM_USE_DEEP_GEMM_E8M0="0"',
        'engine.environment.VLLM_DEEP_GEMM_WARMUP="skip"',
    )


def experts(job: Job) -> None:
    """Many requests at once, so that both copies answer: each must serve the new weights. Both are compared with what
    was sent; the names that are read back are the first copy's, which has one half of the experts."""
    layout = ("engine.parallel.data=2", "engine.parallel.experts=true", "engine.length=2048")
    with job.up({"engine": layout}) as fleets:
        fleet = fleets["engine"]
        for version in (0, 1):
            manifest = fleet.publish(version, seed=1 + version)
            figures = mismatch(fleet)
            job.report.add(**{f"version_{version}": figures})
            job.report.add(**{f"version_{version}": {**figures, **same(manifest, fleet)}})


def deepep(job: Job) -> None:
    """As `experts`, by every way for tokens to reach them: most probable tokens beside the first way's, before and
    after an update."""
    layouts = {
        way: (
            "engine.parallel.data=2",
            "engine.parallel.experts=true",
            "engine.length=2048",
            f'engine.parallel.all_to_all="{way}"',
            "model.hidden_size=2048",  # the least that the kernels of low latency know
            'engine.environment.NVSHMEM_QP_DEPTH="4096"',
        )
        for way in ("allgather_reducescatter", "deepep_high_throughput", "deepep_v2", "deepep_low_latency")
    }
    with job.up(layouts) as fleets:
        for version in (0, 1):
            expected: list[np.ndarray] = []
            for way, fleet in fleets.items():
                try:
                    fleet.publish(version, seed=1 + version)
                    found = _most_probable(fleet)
                    figures: dict[str, Any] = mismatch(fleet)
                except Exception as error:  # one way that fails leaves the others
                    job.report.add(**{f"{way}, version {version}": f"{type(error).__name__}: {error}"[:600]})
                    continue
                expected = expected or found
                pairs = [(a == b).tolist() for a, b in zip(found, expected, strict=True)]
                figures |= {"completions": len(pairs), "the_same": sum(map(all, pairs))}
                figures["tokens_of_the_first"] = [tokens.tolist() for tokens in found[:4]]
                figures["tokens_until_another"] = [
                    (pair.index(False) if False in pair else len(pair)) for pair in pairs
                ]
                job.report.add(**{f"{way}, version {version}": figures})


def _most_probable(fleet: Fleet) -> list[np.ndarray]:
    """Tokens of 16 completions, asked for all at once."""
    engine = fleet.engines[0]
    prompts = engine.prompts(*[24, 200] * 8, seed=6)
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(lambda p: engine.generate(p, temperature=0.0, max_tokens=48)[0], prompts))
    return [answer.tokens for answer in answers]


def same(manifest: Manifest, fleet: Fleet) -> dict[str, Any]:
    """Every tensor that the first copy serves beside the checksum of what was sent."""
    started = time.perf_counter()
    served = fleet.engines[0].get("/weights/checksums")
    found = [record for record in manifest.tensors if record.name in served]
    wrong = [record.name for record in found if served[record.name] != record.checksum]
    return {
        "tensors": len(manifest.tensors),
        "served": len(found),
        "bytes": manifest.nbytes,
        "dtypes": sorted({record.dtype for record in manifest.tensors}),
        "equal": len(found) - len(wrong),
        "wrong": wrong[:6],
        "experts": sorted({int(name.split("experts.")[1].split(".")[0]) for name in served if "experts." in name}),
        "read_back_seconds": time.perf_counter() - started,
    }


def mismatch(fleet: Fleet, *, count: int = 12, length: int = 48) -> dict[str, Any]:
    """k3 against the trainer's modules in float32, request by request; asked all at once."""
    engine = fleet.engines[0]
    prompts = engine.prompts(*[24] * count, seed=5)
    with ThreadPoolExecutor(count) as threads:
        answers = list(
            threads.map(lambda p: engine.generate(p, temperature=1.0, max_tokens=length, seed=11)[0], prompts)
        )
    gaps = [
        theirs - answer.logprobs
        for theirs, answer in zip(fleet.logprobs(prompts, [a.tokens.tolist() for a in answers]), answers, strict=True)
    ]
    return {
        "k3": k3(np.concatenate(gaps)),
        "k3_of_requests": [k3(gap) for gap in gaps],
        "largest_gap": float(max(np.abs(gap).max() for gap in gaps)),
        "tokens": sum(map(len, gaps)),
    }


# --- devices ----------------------------------------------------------------------------------------------------------
def preflight(job: Job) -> None:
    """Health as `prl_slurm.probe` asks for it; the drill as two nodes of one device each would do it."""
    import os

    from prl_slurm import probe

    devices = found()
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    job.report.add(devices=devices, problems=probe.devices(len(devices)), asked_for_too_many=probe.devices(64))
    run_dir = create_run(
        compose(
            write_base(job.folder / job.name, job.sizes),
            overrides=[f'run.dir="{job.folder / job.name / "run"}"'],
            probe=False,
        ),
        job.folder / job.name / "base.toml",
    )
    (run_dir.path / "slurm").mkdir()
    for name, members in (("both", devices), ("one-is-missing", devices[:1])):
        started = time.perf_counter()
        size = str(len(devices))
        words = [sys.executable, "-m", "prl_slurm.drill", str(run_dir.path), "0", name]
        processes = [
            subprocess.Popen(
                [*words, str(rank), size, "30" if name == "both" else "10"],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": device},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, device in enumerate(members)
        ]
        told = [_told_in_time(process) for process in processes]
        job.report.add(
            **{
                name: {
                    "exit_codes": [process.returncode for process in processes],
                    "said": [out.strip() for out, _ in told],
                    "last_words": [err.strip().splitlines()[-1:] for _, err in told],
                    "seconds": round(time.perf_counter() - started, 1),
                }
            }
        )


def _told_in_time(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=40)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()


PARTS: dict[str, Callable[[Job], None]] = {
    "kv": kv,
    "routes": routes,
    "fp8": fp8,
    "deep_gemm": deep_gemm,
    "experts": experts,
    "deepep": deepep,
    "preflight": preflight,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--invariant", action="store_true", help="vLLM's kernels whose results depend on no batch")
    parser.add_argument("--layouts", default="", help="of kv and routes, separated by semicolons")
    options = parser.parse_args()
    report = Report(options.out / f"{options.part}.json")
    report.add(invariant=options.invariant)
    job = Job(
        name=options.part,
        folder=options.out,
        sizes=TOY if options.toy else GPU,
        invariant=options.invariant,
        report=report,
        background=Background(),
        only=tuple(filter(None, options.layouts.split(";"))),
    )
    return report.exit_code(lambda: PARTS[options.part](job))


if __name__ == "__main__":
    sys.exit(main())
