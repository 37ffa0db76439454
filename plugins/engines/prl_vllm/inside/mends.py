"""What vLLM's CPU backend gets wrong today, mended from outside; on every other platform nothing here runs.

Each mend names the place upstream, what happens there without it, and when it can go. `tests/plugins/
test_vllm_mends.py` has a test for each that fails without it. Found on release 0.32.0; those
of experts fit no older one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import attrs
from packaging.version import Version
from torch import Tensor

from prl_vllm import release


@attrs.frozen(kw_only=True)
class Mend:
    """One thing put right."""

    name: str
    where: str
    """Module and function upstream."""
    symptom: str
    """What happens without it."""
    until: str
    """The condition under which it goes."""
    apply: Callable[[], None]
    since: Version | None = None
    """The first release that it fits, where that is not all of them."""

    @property
    def fits(self) -> bool:
        found = release.installed()
        return self.since is None or found is None or found >= self.since


def apply(without: frozenset[str] = frozenset()) -> None:
    """Put everything right that is not named; a second call changes nothing."""
    for mend in MENDS:
        if mend.name not in without and mend.fits:
            mend.apply()


def wrap(owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace `owner.name` by `around(owner.name)`, once."""
    original = getattr(owner, name)
    if not hasattr(original, "mended_by_prl"):
        mended = wraps(original)(around(original))
        mended.mended_by_prl = True  # type: ignore[attr-defined]
        setattr(owner, name, mended)


# --- positions --------------------------------------------------------------------------------------------------------
def _rope() -> None:
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    def around(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def forward_cpu(self: Any, positions: Tensor, query: Tensor, key: Tensor | None = None) -> Any:
            dense = query.is_contiguous() and (key is None or key.is_contiguous())
            return (kernel if dense else type(self).forward_native)(self, positions, query, key)

        return forward_cpu

    wrap(RotaryEmbedding, "forward_cpu", around)


# --- seeds ------------------------------------------------------------------------------------------------------------
def _seeded_prefill() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def discarded(runner: Any) -> dict[int, Any]:
        """Generators of requests whose token of this step will be thrown away."""
        batch = runner.input_batch
        (rows,) = runner.discard_request_mask.np[: batch.num_reqs].nonzero()
        return {int(row): batch.generators[int(row)] for row in rows if int(row) in batch.generators}

    def sampling(sample: Callable[..., Any]) -> Callable[..., Any]:
        def restoring(self: Any, *args: Any, **kwargs: Any) -> Any:
            states = [(generator, generator.get_state()) for generator in discarded(self).values()]
            output = sample(self, *args, **kwargs)
            for generator, state in states:
                generator.set_state(state)
            return output

        return restoring

    def bookkeeping(book: Callable[..., Any]) -> Callable[..., Any]:
        def without_rewinding(self: Any, *args: Any, **kwargs: Any) -> Any:
            batch, hidden = self.input_batch, discarded(self)
            for row in hidden:
                del batch.generators[row]
            try:
                return book(self, *args, **kwargs)
            finally:
                batch.generators.update(hidden)

        return without_rewinding

    wrap(GPUModelRunner, "_sample", sampling)
    wrap(GPUModelRunner, "_bookkeeping_sync", bookkeeping)


# --- experts ----------------------------------------------------------------------------------------------------------
def _experts_after_update() -> None:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    def around(setup: Callable[..., None]) -> Callable[..., None]:
        def setup_kernel(self: Any, layer: Any, w13: Tensor, w2: Tensor) -> None:
            again = self.moe_kernel is not None
            setup(self, layer, w13, w2)
            if again:
                self.moe_kernel.fused_experts.process_weights_after_loading(layer)

        return setup_kernel

    wrap(UnquantizedFusedMoEMethod, "_setup_kernel", around)


def _expert_map() -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    def around(kernel: Callable[..., None]) -> Callable[..., None]:
        def apply(self: Any, *args: Any, **kwargs: Any) -> None:
            call = dict(zip(_APPLY, args, strict=False)) | kwargs
            if (local := call["expert_map"]) is not None:
                ids = local[call["topk_ids"].long()]  # global number -> place on this rank, -1 elsewhere
                call["topk_weights"] = call["topk_weights"].masked_fill(ids < 0, 0.0)
                call["topk_ids"] = ids.clamp_min(0).to(call["topk_ids"].dtype)
                call["expert_map"] = None
            kernel(self, **call)

        return apply

    wrap(CPUUnquantizedExperts, "apply", around)


_APPLY = (
    "output",
    "hidden_states",
    "w1",
    "w2",
    "topk_weights",
    "topk_ids",
    "activation",
    "global_num_experts",
    "expert_map",
    "a1q_scale",
    "a2_scale",
    "workspace13",
    "workspace2",
    "expert_tokens_meta",
    "apply_router_weight_on_input",
)
"""Parameters of `FusedMoEExpertsModular.apply`, which is called by position and by keyword."""


def _experts_without_gate() -> None:
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    def tolerate(check: Callable[[Any], None]) -> Callable[[Any], None]:
        def post_init(self: Any) -> None:
            try:
                check(self)
            except NotImplementedError as refusal:  # the last thing that the check does
                if "is_act_and_mul" not in str(refusal):
                    raise

        return post_init

    def extend(candidates: Callable[[Any], list[type]]) -> Callable[[Any], list[type]]:
        def classes(backend: Any) -> list[type]:
            found = candidates(backend)
            if backend is not unquantized.UnquantizedMoeBackend.CPU:
                return found
            from prl_vllm.inside.experts import PlainExperts

            return [*found, PlainExperts]

        return classes

    wrap(config.FusedMoEConfig, "__post_init__", tolerate)
    wrap(unquantized, "backend_to_kernel_cls", extend)


# --- tiers of the KV cache --------------------------------------------------------------------------------------------
def _tiers() -> None:
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

    from prl_vllm.inside import tiers

    wrap(CPUOffloadingSpec, "__init__", tiers.with_room_for_routes)
    wrap(CPUOffloadingSpec, "get_worker", tiers.copying)


# --- processors -------------------------------------------------------------------------------------------------------
def _processors() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    def around(create: Callable[..., Any]) -> Callable[..., Any]:
        def create_connector(*args: Any, **kwargs: Any) -> Any:
            before = os.sched_getaffinity(0)
            connector = create(*args, **kwargs)
            os.sched_setaffinity(0, before)
            return connector

        return create_connector

    wrap(KVConnectorFactory, "create_connector", around)


def _progress() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    def without_thread(init: Callable[..., None]) -> Callable[..., None]:
        def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            self.enable_pthread = False

        return initialise

    def around(find: Callable[..., type]) -> Callable[..., type]:
        def get_connector_class(*args: Any, **kwargs: Any) -> type:
            connector = find(*args, **kwargs)
            if connector.__name__.startswith("Nixl"):  # else NIXL is not loaded, and may not be installed
                from vllm.distributed.nixl_utils import nixl_agent_config

                wrap(nixl_agent_config, "__init__", without_thread)
            return connector

        return get_connector_class

    wrap(KVConnectorFactory, "get_connector_class", around)


MENDS = (
    Mend(
        name="rope",
        where="vllm/model_executor/layers/rotary_embedding/base.py: RotaryEmbedding.forward_cpu",
        symptom="the kernel takes strided queries and keys, which latent attention gives it, for dense ones: logprobs "
        "of the DeepSeek, Kimi and GLM families are off by 0.05 to 0.2 nat",
        until="forward_cpu looks at strides, or its kernel does",
        apply=_rope,
    ),
    Mend(
        name="seeded_prefill",
        where="vllm/v1/worker/gpu_model_runner.py: GPUModelRunner._bookkeeping_sync",
        symptom="where a prompt is computed in parts, the generator of a request with a seed is rewound by offset, "
        "which CPU generators cannot do: the engine core ends",
        until="_bookkeeping_sync rewinds by state where a generator has no offset",
        apply=_seeded_prefill,
    ),
    Mend(
        name="experts_after_update",
        where="vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py: _setup_kernel",
        symptom="experts are packed for the kernel on the first load only: after a weight update they are garbage, "
        "and nothing says so",
        until="_setup_kernel calls process_weights_after_loading of the experts on updates too",
        apply=_experts_after_update,
        since=release.CPU_EXPERTS,
    ),
    Mend(
        name="expert_map",
        where="vllm/model_executor/layers/fused_moe/experts/cpu_moe.py: CPUUnquantizedExperts.apply",
        symptom="the map from global to local experts is ignored: with --enable-expert-parallel a segmentation fault",
        until="apply passes expert_map to its kernel",
        apply=_expert_map,
        since=release.CPU_EXPERTS,
    ),
    Mend(
        name="experts_without_gate",
        where="vllm/model_executor/layers/fused_moe/config.py: FusedMoEConfig.__post_init__",
        symptom="experts without a gate (relu squared: the Nemotron 3 family) are refused",
        until="a CPU experts class supports activations without multiplication",
        apply=_experts_without_gate,
        since=release.CPU_EXPERTS,
    ),
    Mend(
        name="tiers",
        where="vllm/v1/kv_offload/cpu/spec.py: CPUOffloadingSpec.get_worker",
        symptom="host memory and disk behind the KV cache are refused: blocks are copied by CUDA streams alone",
        until="get_worker has a worker for caches in host memory, and it carries routes where routes.py keeps them",
        apply=_tiers,
    ),
    Mend(
        name="processors",
        where="vllm/distributed/kv_transfer/kv_connector/v1/nixl/base_worker.py: NixlBaseConnectorWorker.__init__",
        symptom="with NIXL the worker's main thread is bound to the last core, also where its computing threads are "
        "bound to none: all servers of a machine compute on one core, and on two cores a transfer takes a minute",
        until="the core is set apart only where VLLM_CPU_OMP_THREADS_BIND sets the others apart",
        apply=_processors,
    ),
    Mend(
        name="progress",
        where="vllm/distributed/kv_transfer/kv_connector/v1/nixl/base_worker.py: NixlBaseConnectorWorker.__init__",
        symptom="NIXL's progress thread never sleeps: each server takes a core from all others, computing or not, and "
        "on two cores a transfer takes seconds",
        until="the agent's progress thread waits for events, or can be left out by an option: whoever has a transfer "
        "open polls it between steps in any case",
        apply=_progress,
    ),
)
