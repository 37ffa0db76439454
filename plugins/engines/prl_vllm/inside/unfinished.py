"""What requests that are under way go on with when weights change, in vLLM's scheduler, on every platform.

A request that has sampled nothing yet begins anew: its first token counts as one of the new weights, and so must what
it is sampled from. Upstream goes on in the middle of a prompt with keys and values of the weights before, and a request
that waits finds those of others in the cache. Requests that have tokens keep what they have (or compute it again:
`engine.on_update`), and what they compute is kept from the tiers behind the cache: its blocks are named after weights
that host memory and disk may still be asked for, by an engine that has not been updated yet, or is started again.

Upstream a pause marks no request, and a cache is not emptied while anybody reads a block of it (`vllm/v1/core/sched/
scheduler.py`). It goes when blocks are named after the version that computed them. Releases that tell no versions end
all requests of an update, except those that arrive while they are paused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from prl_vllm.inside.connectors import each
from prl_vllm.inside.mends import wrap
from prl_vllm.release import tells_versions


def install() -> None:
    """Look after unfinished requests where the version changes, and where the cache is emptied for that."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    wrap(Scheduler, "reset_prefix_cache", _despite_readers)
    if tells_versions():
        wrap(EngineCore, "set_weight_version", _changing)


def _changing(change: Callable[..., None]) -> Callable[..., None]:
    def set_weight_version(self: Any, version: str) -> None:
        begin_anew(self.scheduler, [request for request in _own(self.scheduler) if not request.num_output_tokens])
        for connector in _tiers(self.scheduler.connector):
            for stored in connector.connector_scheduler._req_status.values():
                stored.max_offload_tokens = min(
                    stored.max_offload_tokens if stored.max_offload_tokens is not None else stored.req.num_tokens,
                    stored.req.num_computed_tokens,
                )
        change(self, version)

    return set_weight_version


def _despite_readers(reset: Callable[..., bool]) -> Callable[..., bool]:
    def reset_prefix_cache(self: Any, *args: Any, **kwargs: Any) -> bool:
        try:
            return reset(self, *args, **kwargs)
        except RuntimeError:  # every request was stopped, but blocks are kept for others, or being fetched
            begin_anew(self, list(_own(self)))
            return True

    return reset_prefix_cache


def begin_anew(scheduler: Any, requests: list[Any]) -> None:
    """Compute these requests from their first token, and share it only among themselves; nothing may be under way."""
    from vllm.v1.request import RequestStatus

    renewals = scheduler.__dict__["prl_renewals"] = scheduler.__dict__.get("prl_renewals", 0) + 1
    for request in reversed(requests):  # the last is put before the queue first
        if request.status == RequestStatus.RUNNING:
            scheduler.running.remove(request)
            scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
            scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)
        elif request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            # As when what it waits for cannot be had: its blocks are freed once nobody writes to them any more.
            scheduler.failed_recving_kv_req_ids.add(request.request_id)
            request.num_computed_tokens = 0
        elif request.num_computed_tokens:
            scheduler.kv_cache_manager.free(request)
            request.num_computed_tokens = 0
        request.cache_salt = f"{request.cache_salt}-{renewals}"
        request.block_hashes.clear()
        request.update_block_hashes()
    names = {request.request_id for request in requests}
    for connector in _tiers(scheduler.connector):
        for name in names & connector.connector_scheduler._req_status.keys():
            for group in connector.connector_scheduler._req_status[name].group_states:
                group.offload_keys.clear()
                group.next_stored_chunk_idx = 0


def _own(scheduler: Any) -> Iterator[Any]:
    """Unfinished requests, without those that move prompts between engines: whoever sent them knows of the change."""
    return (r for r in scheduler.requests.values() if not r.is_finished() and not r.kv_transfer_params)


def _tiers(connector: Any) -> Iterator[Any]:
    """The connectors that have tiers, among one or several."""
    return (one for one in each(connector) if type(one).__name__ == "OffloadingConnector")
