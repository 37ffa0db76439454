"""Host memory and disk behind the KV cache, on vLLM's CPU backend; expert choices go along with keys and values.

Upstream's tiers are what they are elsewhere: its connector decides what is stored and found, its secondary tiers read
and write files. What a GPU's copy engines do between cache and host memory is done here by plain copies between two
steps. Where routes are reported, they are one more tensor of the cache: a block that comes back from host memory or
disk, in this process or another, brings the routes of its tokens. Applied by the mend `tiers`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from prl_vllm.inside import ROUTE_BYTES, routes


class CopyingWorker(OffloadingWorker):
    """Copies blocks when it is told to, and is done when it returns."""

    def __init__(
        self, caches: CanonicalKVCaches, region: SharedOffloadRegion, *, blocks_per_chunk: int, route_bytes: int
    ) -> None:
        hosts = [region.create_next_worker_view(tensor.page_size_bytes * blocks_per_chunk) for tensor in caches.tensors]
        self._region = region
        self._blocks_per_chunk = blocks_per_chunk
        self._tensors = [
            [
                (_pages(caches.tensors[ref.tensor_idx].tensor), _chunks(hosts[ref.tensor_idx], blocks_per_chunk))
                for ref in group
            ]
            for group in caches.group_data_refs
        ]
        """By group: cache [blocks, bytes] and host memory [chunks, blocks of a chunk, bytes] of each of its tensors."""
        self._route_bytes = route_bytes
        self._routes: tuple[NDArray[np.int8], NDArray[np.int8]] | None = None
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        return self._copy(job_id, src_spec, dst_spec, store=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        return self._copy(job_id, dst_spec, src_spec, store=False)

    def _copy(self, job_id: int, cache: GPULoadStoreSpec, host: LoadStoreSpec, *, store: bool) -> bool:
        assert isinstance(host, BlockIDsLoadStoreSpec)
        started, nbytes = time.perf_counter(), 0
        for group, blocks, chunks, places in self._blocks(cache, host):
            for cached, kept in self._of(group):
                if store:
                    kept[chunks, places] = cached[blocks]
                else:
                    cached[blocks] = kept[chunks, places]
                nbytes += len(blocks) * cached.shape[1]
        self._done.append(TransferResult(job_id, True, nbytes, time.perf_counter() - started))
        return True

    def _blocks(
        self, cache: GPULoadStoreSpec, host: BlockIDsLoadStoreSpec
    ) -> Iterator[tuple[int, NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """(group, [n] blocks of the cache, [n] chunks, [n] places in their chunks); a chunk may be entered late."""
        at, chunk = 0, 0
        for group, (count, first) in enumerate(zip(cache.group_sizes, cache.block_indices, strict=True)):
            places = first % self._blocks_per_chunk + np.arange(count)
            which = places // self._blocks_per_chunk
            yield (
                group,
                cache.block_ids[at : at + count],
                host.block_ids[chunk + which],
                places % self._blocks_per_chunk,
            )
            at += count
            chunk += int(which[-1]) + 1 if count else 0

    def _of(self, group: int) -> Iterator[tuple[NDArray[np.int8], NDArray[np.int8]]]:
        yield from self._tensors[group]
        recorder = routes.recorder
        if self._route_bytes and recorder is not None and group == recorder.group:
            if self._routes is None:
                pages = recorder.pages
                view = self._region.create_next_worker_view(pages.shape[1] * self._blocks_per_chunk)
                self._routes = pages, _chunks(view, self._blocks_per_chunk)
            yield self._routes

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def shutdown(self) -> None:
        self._tensors.clear()
        self._routes = None
        self._region.cleanup()


def _pages(tensor: Any) -> NDArray[np.int8]:
    pages: NDArray[np.int8] = tensor.numpy()  # [blocks, bytes], perhaps strided
    return pages


def _chunks(view: Any, blocks_per_chunk: int) -> NDArray[np.int8]:
    chunks: NDArray[np.int8] = view.view(len(view), blocks_per_chunk, -1).numpy()
    return chunks


# --- where they are put in --------------------------------------------------------------------------------------------
def with_room_for_routes(init: Callable[..., None]) -> Callable[..., None]:
    """Around `CPUOffloadingSpec.__init__`, in the scheduler and in workers; `carried_routes.py` needs it too."""

    def initialise(self: Any, config: Any) -> None:
        route_bytes = int(config.extra_config.get(ROUTE_BYTES, 0))
        more = route_bytes * max(group.tokens_per_block for group in config.groups)
        init(self, replace(config, worker_kv_bytes_per_block=config.worker_kv_bytes_per_block + more))

    return initialise


def copying(get: Callable[..., Any]) -> Callable[..., Any]:
    """Around `CPUOffloadingSpec.get_worker`."""

    def get_worker(self: Any, caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self.config.engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            route_bytes = int(self.extra_config.get(ROUTE_BYTES, 0))
            self._worker = CopyingWorker(
                caches, region, blocks_per_chunk=self.blocks_per_chunk, route_bytes=route_bytes
            )
        worker: OffloadingWorker = self._worker
        return worker

    return get_worker
