"""A run's engine section as vLLM's command line and environment. Knows names of arguments, starts nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from prl.compose.config import Run

from prl_vllm import release
from prl_vllm.config import KvTiers, Parallel, Prefill, VllmConfig
from prl_vllm.inside import HANDOVER, ROUTE_BYTES, ROUTES, SWITCH, TIERS

CPU_KV_CACHE_BYTES = 256 << 20
EXTENSION = "prl_vllm.inside.worker.Extension"


class ServedModel(Protocol):
    """What matters of the model (`model_files.Described`)."""

    @property
    def dtype(self) -> str: ...

    @property
    def latent(self) -> bool: ...

    @property
    def recurrent(self) -> bool: ...


def arguments(
    run: Run,
    config: VllmConfig,
    served: ServedModel,
    *,
    model: Path,
    cpu: bool,
    route_bytes: int = 0,
    identity: str = "",
) -> dict[str, Any]:
    """Python name -> value of every argument but the address; `engine.options` may override defaults, not decisions.

    `route_bytes`: of the expert choices of one token; 0 where they are not reported. `identity`: what vLLM calls this
    server where it shares keys and values.
    """
    kv_cache = config.kv_cache_bytes or (CPU_KV_CACHE_BYTES if cpu else 0)
    return {
        **({"enforce_eager": True} if cpu else {}),  # compilation takes longer than small runs do
        # On processors with AMX vLLM prefers a kernel that computes in bfloat16 alone, whatever the dtype.
        **({"attention_backend": "CPU_MLA"} if cpu and served.latent and served.dtype == "float32" else {}),
        **_parallel(config.parallel),
        **_kv_transfer(config, cpu=cpu, route_bytes=route_bytes, identity=identity),
        **({"quantization": "fp8"} if config.fp8.weights else {}),
        **({"kv_cache_dtype": "fp8"} if config.fp8.kv_cache else {}),
        **({"enable_return_routed_experts": True} if route_bytes and not cpu else {}),
        **config.options,
        "model": str(model),
        "load_format": "dummy",  # the first version is published before anything is generated
        "skip_tokenizer_init": True,
        "dtype": served.dtype,
        "seed": run.run.seed,
        "max_num_seqs": config.sequences,
        "max_model_len": config.length or run.rollouts.sequence_length,
        # On a CPU the states of recurrent layers that prefixes end in are looked for outside their table.
        "enable_prefix_caching": config.prefix_caching and not (cpu and served.recurrent),
        **({"kv_cache_memory_bytes": kv_cache} if kv_cache else {}),
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": EXTENSION,
        **({"enable_scale_out": True} if "enable_scale_out" in release.arguments() else {}),
        "disable_uvicorn_access_log": True,
    }


def _parallel(parallel: Parallel) -> dict[str, Any]:
    experts = {"enable_expert_parallel": True, "all2all_backend": parallel.all_to_all} if parallel.experts else {}
    copies = parallel.redundant_experts
    return {
        "tensor_parallel_size": parallel.tensor,
        "data_parallel_size": parallel.data,
        **experts,
        **({"enable_eplb": True, "eplb_config": {"num_redundant_experts": copies}} if copies else {}),
    }


def _kv_transfer(config: VllmConfig, *, cpu: bool, route_bytes: int, identity: str) -> dict[str, Any]:
    """Where keys and values go, and come from. What cannot be had from there is computed."""
    connectors = [*_hand_over(config.prefill, cpu=cpu), *_kv_tiers(config.kv_tiers, route_bytes)]
    if not connectors:
        return {}
    several = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": connectors}}
    chosen = connectors[0] if len(connectors) == 1 else several
    common = {"kv_role": "kv_both", "engine_id": identity, "kv_load_failure_policy": "recompute"}
    return {"kv_transfer_config": {**chosen, **common}}


def _hand_over(prefill: Prefill, *, cpu: bool) -> Iterator[dict[str, Any]]:
    if prefill.count:
        # What nobody fetched within the lease is forgotten; until then nothing else may be written there.
        lease = {"kv_lease_duration": round(2 * prefill.patience) + 1}
        device = {"kv_buffer_device": "cpu"} if cpu else {}
        nixl = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
        yield {**nixl, **device, "kv_connector_extra_config": lease}


def _kv_tiers(tiers: KvTiers, route_bytes: int) -> Iterator[dict[str, Any]]:
    if not tiers.host_bytes:
        return
    extra: dict[str, Any] = {"cpu_bytes_to_use": tiers.host_bytes}
    if tiers.disk:
        extra |= {"spec_name": "TieringOffloadingSpec", "secondary_tiers": [{"type": "fs", "root_dir": tiers.disk}]}
    if route_bytes:
        extra |= {ROUTE_BYTES: route_bytes}
    yield {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def command_line(values: Mapping[str, Any]) -> Iterator[str]:
    """`--max-num-seqs 64 --no-enable-prefix-caching ...`: flags for true and false, JSON for tables and lists."""
    for name, value in values.items():
        flag = name.replace("_", "-")
        if value is True:
            yield f"--{flag}"
        elif value is False:
            yield f"--no-{flag}"
        else:
            yield f"--{flag}"
            yield value if isinstance(value, str) else json.dumps(value)


def environment(
    config: VllmConfig, *, cpu: bool, routes: bool = False, exchange: tuple[str, int] | None = None
) -> dict[str, str]:
    """What is added to the environment of vLLM's processes.

    `exchange`: address and port at which other servers learn where the keys and values of this one are.
    """
    # Threads that spin while they wait for each other take the cores from those they wait for.
    threads = {"OMP_NUM_THREADS": str(config.threads), "OMP_WAIT_POLICY": "passive"}
    return {
        SWITCH: "1",
        "VLLM_SERVER_DEV_MODE": "1",  # the endpoints for pausing and for calls into workers
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # everything it loads is in the run directory
        **({**threads, "VLLM_CPU_OMP_THREADS_BIND": "nobind"} if cpu else {}),
        **({"VLLM_USE_DEEP_GEMM": str(int(config.fp8.deep_gemm))} if config.fp8.weights else {}),
        **({ROUTES: "1"} if routes else {}),
        **({TIERS: "1"} if config.kv_tiers.host_bytes else {}),
        **_deepep(config.parallel),
        **(
            {
                HANDOVER: "1",
                "VLLM_NIXL_SIDE_CHANNEL_HOST": exchange[0],
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(exchange[1]),
            }
            if exchange
            else {}
        ),
        **config.environment,
    }


def _deepep(parallel: Parallel) -> dict[str, str]:
    """What version 2 needs: a communicator of its own, for vLLM has made none yet, and on one node no network."""
    if parallel.all_to_all != "deepep_v2":
        return {}
    return {"EP_REUSE_NCCL_COMM": "0", **({"EP_DISABLE_GIN": "1"} if parallel.nodes == 1 else {})}


def on_cpu(run: Run) -> bool:
    """Whether the server computes on a CPU."""
    return release.cpu_build() or run.trainer.device == "cpu"
