"""Routes that leave a GPU's cache and come back with their blocks: vLLM's own classes, on tensors in host memory."""

from __future__ import annotations

import os
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from prl_vllm import release

from tests.plugins.served_vllm import needs_vllm

pytestmark = needs_vllm

BLOCKS, BLOCK, LAYERS, CHOSEN = 6, 4, 3, 2
KEYS = 32
"""Bytes of a block's keys and values."""


def caches() -> tuple[torch.Tensor, Any]:
    from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor

    keys = torch.arange(BLOCKS * KEYS, dtype=torch.int8).view(BLOCKS, KEYS)
    other = torch.zeros(BLOCKS, KEYS, dtype=torch.int8)
    tensors = [CanonicalKVCacheTensor(keys, KEYS), CanonicalKVCacheTensor(other, KEYS)]
    return keys, CanonicalKVCaches(tensors, [[CanonicalKVCacheRef(0, KEYS)], [CanonicalKVCacheRef(1, KEYS)]])


@pytest.mark.parametrize("number", [1, 2])
def test_what_comes_back_brings_its_routes_to_the_schedulers_table(number: int) -> None:
    from prl_vllm.inside import carried_routes
    from prl_vllm.inside.tiers import CopyingWorker
    from vllm.v1.kv_offload.base import GPULoadStoreSpec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

    token_bytes = LAYERS * CHOSEN * number
    keys, upstream = caches()
    pages = torch.zeros(BLOCKS, BLOCK * token_bytes, dtype=torch.int8)
    worker = carried_routes.CarryingWorker(pages, token_bytes, group=0)
    size = 2 * KEYS + pages.shape[1]
    region = SharedOffloadRegion(
        engine_id=f"test-{os.getpid()}", num_chunks=4, rank=0, kv_bytes_per_chunk=4096, cpu_page_size=size
    )
    worker.inner = CopyingWorker(carried_routes.with_pages(upstream, worker), region, blocks_per_chunk=1, route_bytes=0)
    try:
        chosen = torch.randint(0, 256 if number == 1 else 300, (2 * BLOCK, LAYERS, CHOSEN), dtype=torch.int32)
        worker.record(chosen, torch.cat([4 * BLOCK + torch.arange(BLOCK), BLOCK + torch.arange(BLOCK)]))
        kept = keys[[4, 1]].clone()
        worker.submit_store(1, GPULoadStoreSpec([4, 1, 5], [2, 1], [0, 0]), CPULoadStoreSpec([3, 0, 2]))
        assert [done.job_id for done in worker.get_finished()] == [1]
        assert not worker.arrived
        worker.record(torch.zeros_like(chosen), torch.arange(2 * BLOCK))  # others have the slots now
        worker.submit_load(2, CPULoadStoreSpec([3, 0, 2]), GPULoadStoreSpec([0, 2, 3], [2, 1], [0, 0]))
        assert [done.job_id for done in worker.get_finished()] == [2]
    finally:
        worker.inner.shutdown()
    assert torch.equal(keys[[0, 2]], kept)
    table = np.zeros((BLOCKS * BLOCK, LAYERS, CHOSEN), np.uint8 if number == 1 else np.uint16)
    carried_routes.put(table, BLOCK, worker.arrived)
    blocks = table.reshape(BLOCKS, BLOCK, LAYERS, CHOSEN)
    np.testing.assert_array_equal(np.concatenate([blocks[0], blocks[2]]), chosen.numpy())
    assert not blocks[[1, 3, 4, 5]].any()


def test_reports_of_several_workers_are_one_with_the_routes_of_the_first() -> None:
    from prl_vllm.inside.carried_routes import Arrived, Completed
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata

    arrived = Arrived(np.array([2]), np.ones((1, 8), np.int8))
    first: Completed = pickle.loads(pickle.dumps(Completed({7: 1, 8: 1}, arrived=(arrived,))))
    both = first.aggregate(Completed({7: 1}, arrived=(arrived,))).aggregate(OffloadingWorkerMetadata({7: 1}))
    assert both.completed_jobs == {7: 3, 8: 1}
    assert [one.blocks.tolist() for one in both.arrived] == [[2]]
    assert both.arrived[0].pages.tolist() == arrived.pages.tolist()


def test_which_releases_keep_routes_by_slot() -> None:
    found = release.installed()
    assert found is not None
    assert release.keeps_routes_by_slot() == (found < Version("0.30"))
