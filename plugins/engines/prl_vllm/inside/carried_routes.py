"""Routes of blocks that leave a GPU's cache for host memory or disk and come back, in releases that keep them by slot.

vLLM before 0.30 has the routes of every slot of the KV cache in its scheduler (`fused_moe/routed_experts_capturer.py`,
RoutedExpertsManager), and a block that comes back from a tier lies in other slots. Here each worker keeps the routes of
its slots beside keys and values, as one more tensor of the cache on its device, so that upstream's connector
stores and loads them with the rest of a block. Together with the news that a load is done, the scheduler is told the
routes of what was loaded.

    step ──► chosen experts of its tokens ──► pages of their blocks ◄──► host memory ◄──► disk
                                                 │ a load is done
                                                 └──► scheduler's table, before the request that waits for it is resumed

Of several workers the first one's are taken: all have the same. It goes when upstream's tiers carry routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)

from prl_vllm.inside import ROUTE_BYTES
from prl_vllm.inside.mends import wrap
from prl_vllm.inside.tiers import with_room_for_routes


@dataclass
class Arrived:
    """Routes of blocks that a worker's cache has again."""

    blocks: NDArray[Any]  # [n]
    pages: NDArray[np.int8]  # [n, bytes]


@dataclass
class Completed(OffloadingWorkerMetadata):
    """What a worker reports of its transfers, and the routes that came with them."""

    arrived: tuple[Arrived, ...] = ()

    def aggregate(self, other: Any) -> Completed:
        """Of several workers."""
        merged = super().aggregate(other)
        assert isinstance(merged, OffloadingWorkerMetadata)
        return Completed(merged.completed_jobs, merged.transfer_stats, self.arrived)


# --- in workers -------------------------------------------------------------------------------------------------------
@attrs.define(eq=False)
class CarryingWorker(OffloadingWorker):
    """Upstream's worker, over a cache in which every block has its routes too."""

    pages: Tensor  # [blocks, bytes] int8, on the device
    token_bytes: int
    group: int
    """Which of the KV cache's groups has a slot for every token."""
    inner: OffloadingWorker | None = None
    arrived: list[Arrived] = attrs.field(factory=list)
    """Not told yet."""
    _loading: dict[int, NDArray[Any]] = attrs.field(factory=dict)
    """Job -> [n] blocks of the cache."""

    def record(self, chosen: Tensor, slots: Tensor) -> None:
        """Keep the experts [tokens, layers, experts per token] of the tokens in slots [tokens]."""
        number = torch.uint8 if self.token_bytes == chosen[0].numel() else torch.int16
        table = self.pages.view(number).view(-1, *chosen.shape[1:])
        table.index_copy_(0, slots, chosen.to(number))

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        return self._upstream.submit_store(job_id, src_spec, dst_spec)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        first = sum(dst_spec.group_sizes[: self.group])
        self._loading[job_id] = np.asarray(dst_spec.block_ids)[first : first + dst_spec.group_sizes[self.group]]
        return self._upstream.submit_load(job_id, src_spec, dst_spec)

    def get_finished(self) -> list[TransferResult]:
        done: list[TransferResult] = self._upstream.get_finished()
        for transfer in done:
            blocks = self._loading.pop(transfer.job_id, None)
            if blocks is not None and len(blocks):
                self.arrived.append(Arrived(blocks, self._read(blocks)))
        return done

    def wait(self, job_ids: set[int]) -> None:
        self._upstream.wait(job_ids)

    def shutdown(self) -> None:
        self._upstream.shutdown()

    @property
    def _upstream(self) -> OffloadingWorker:
        assert self.inner is not None
        return self.inner

    def _read(self, blocks: NDArray[Any]) -> NDArray[np.int8]:
        """On a stream of its own: the step that was just sent to the device is not waited for."""
        device = self.pages.device
        with nullcontext() if device.type == "cpu" else torch.Stream(device=device):
            pages: NDArray[np.int8] = self.pages[torch.from_numpy(blocks.astype(np.int64)).to(device)].cpu().numpy()
        return pages


carrying: CarryingWorker | None = None
"""Of this process."""


def _beginning(begin: Callable[..., None]) -> Callable[..., None]:
    """Around `OffloadingConnectorWorker._init_worker`, which is told the cache's tensors."""

    def init_worker(self: Any, caches: CanonicalKVCaches) -> None:
        global carrying
        groups = self.kv_cache_config.kv_cache_groups
        group = next(i for i, g in enumerate(groups) if isinstance(g.kv_cache_spec, FullAttentionSpec))
        token_bytes, cache = int(self.spec.extra_config[ROUTE_BYTES]), caches.tensors[0].tensor
        shape = len(cache), token_bytes * groups[group].kv_cache_spec.block_size
        pages = torch.zeros(shape, dtype=torch.int8, device=cache.device)
        carrying = CarryingWorker(pages, token_bytes, group)
        begin(self, with_pages(caches, carrying))
        carrying.inner, self.worker = self.worker, carrying
        _record_steps()

    return init_worker


def with_pages(caches: CanonicalKVCaches, worker: CarryingWorker) -> CanonicalKVCaches:
    """The cache with one more tensor."""
    size, refs = worker.pages.shape[1], [list(group) for group in caches.group_data_refs]
    refs[worker.group].append(CanonicalKVCacheRef(len(caches.tensors), size))
    return CanonicalKVCaches([*caches.tensors, CanonicalKVCacheTensor(worker.pages, size)], refs)


def _record_steps() -> None:
    """Here and not at the start: the scheduler's process need not import what computes."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def recording(book: Callable[..., Any]) -> Callable[..., Any]:
        def bookkeeping(self: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            if carrying is not None and self.routed_experts_initialized:
                count = scheduled.total_num_scheduled_tokens
                chosen = self.routed_experts_capturer.get_device_buffer()
                carrying.record(chosen[:count], self.routed_experts_slot_mapping_device[:count])
            return book(self, scheduled, *args, **kwargs)

        return bookkeeping

    wrap(GPUModelRunner, "_bookkeeping_sync", recording)


def _reporting(build: Callable[..., Any]) -> Callable[..., Any]:
    """Around `OffloadingConnectorWorker.build_connector_worker_meta`."""

    def build_connector_worker_meta(self: Any) -> Any:
        report = build(self)
        if report is None or carrying is None or not carrying.arrived:
            return report
        arrived, carrying.arrived = carrying.arrived, []
        return Completed(report.completed_jobs, report.transfer_stats, tuple(arrived))

    return build_connector_worker_meta


# --- in the scheduler -------------------------------------------------------------------------------------------------
manager: Any = None
"""Of the scheduler in this process: RoutedExpertsManager."""


def _keeping(init: Callable[..., None]) -> Callable[..., None]:
    """Around `RoutedExpertsManager.__init__`."""

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        global manager
        init(self, *args, **kwargs)
        manager = self

    return initialise


def _taking(update: Callable[..., None]) -> Callable[..., None]:
    """Around `OffloadingConnectorScheduler.update_connector_output`."""

    def update_connector_output(self: Any, output: Any) -> None:
        report = output.kv_connector_worker_meta
        if isinstance(report, Completed):
            put(manager.routed_experts_by_slot, manager.block_size, report.arrived)
        update(self, output)

    return update_connector_output


def put(table: NDArray[Any], block_size: int, arrived: Iterable[Arrived]) -> None:
    """Into the table [slots, layers, experts per token]."""
    pages = table.view(np.int8).reshape(len(table) // block_size, -1)
    for one in arrived:
        pages[one.blocks] = one.pages


# --- where all of it is put in ----------------------------------------------------------------------------------------
def install() -> None:
    """In every process of a server; each uses its part."""
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import RoutedExpertsManager
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

    wrap(CPUOffloadingSpec, "__init__", with_room_for_routes)
    wrap(OffloadingConnectorWorker, "_init_worker", _beginning)
    wrap(OffloadingConnectorWorker, "build_connector_worker_meta", _reporting)
    wrap(RoutedExpertsManager, "__init__", _keeping)
    wrap(OffloadingConnectorScheduler, "update_connector_output", _taking)
