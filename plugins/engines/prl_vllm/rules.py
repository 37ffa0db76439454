"""What must hold for a run on vLLM: checked where it is composed, without importing vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prl.compose.config import Run
from prl.compose.discover import did_you_mean

from prl_vllm import release
from prl_vllm.config import VllmConfig

OWN_ARGUMENTS = {
    "model": "the run's [model]",
    "tokenizer": "the run's [tokenizer]",
    "skip_tokenizer_init": "the run's [tokenizer]",
    "dtype": "[quantization]",
    "load_format": "[weights]",
    "max_num_seqs": "engine.sequences",
    "max_model_len": "engine.length",
    "kv_cache_memory_bytes": "engine.kv_cache_bytes",
    "enable_prefix_caching": "engine.prefix_caching",
    "logprobs_mode": "prl: the trainer needs them under the sampling temperature",
    "worker_extension_cls": "prl: it brings the weights in",
    "host": "prl: the server is reached through the engine",
    "port": "prl: the server is reached through the engine",
    "uds": "prl: the server is reached through the engine",
    "api_key": "prl: the run's token guards the engine",
}
"""Arguments of vLLM that are not `engine.options`, and what decides each instead."""


def problems(engine: VllmConfig, run: Run) -> Iterator[str]:
    """One sentence for each thing that does not fit."""
    if 0 < engine.length < run.rollouts.sequence_length:
        yield (
            f"engine.length = {engine.length} is shorter than rollouts.sequence_length = "
            f"{run.rollouts.sequence_length}; raise it, or leave it out"
        )
    yield from _servers(engine)
    yield from _release()
    yield from _names("engine.options", engine.options, release.arguments(), "an argument")
    yield from _names("engine.environment", _vllm_only(engine.environment), release.variables(), "a variable")


def _servers(engine: VllmConfig) -> Iterator[str]:
    if engine.servers and len(engine.servers) != engine.count:
        yield f"engine.servers names {len(engine.servers)} servers for engine.count = {engine.count} engines"
    if engine.servers and (engine.options or engine.environment):
        yield "engine.servers run already: give engine.options and engine.environment to whoever starts them"


def _release() -> Iterator[str]:
    found = release.installed()
    if found is not None and found not in release.SUPPORTED:
        yield f"vLLM {found} is installed; this plugin knows releases {release.SUPPORTED}"


def _names(where: str, given: Iterable[str], known: frozenset[str], what: str) -> Iterator[str]:
    for name in given:
        if name in OWN_ARGUMENTS:
            yield f"{where}.{name} is decided by {OWN_ARGUMENTS[name]}"
        elif known and name not in known:
            yield f"{where}.{name} is not {what} of vLLM {release.installed()}{did_you_mean(name, known)}"


def _vllm_only(environment: Iterable[str]) -> list[str]:
    return [name for name in environment if name.startswith("VLLM_")]
