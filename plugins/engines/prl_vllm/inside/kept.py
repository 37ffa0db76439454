"""Prompts that vLLM keeps for other engines do not hold up a pause, and are let go when nobody will fetch them.

Upstream counts a finished request as work as long as a connector holds its blocks (`vllm/v1/core/sched/scheduler.py`,
`has_finished_requests`), and a pause waits until there is no work: with a prompt that nobody fetches, until its lease
is over. Nothing of such a request is computed any more, and an update does not touch its blocks: they can be read
before, during and after it, by engines that still serve what computed them. The first part goes when a pause upstream
waits for computation alone, the second when a server can be told to release a lease.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from prl_vllm.inside.connectors import each
from prl_vllm.inside.mends import wrap

RELEASED = "prl_released"
"""Attribute of NIXL's worker: requests to be let go in its next step."""


# --- in the scheduler -------------------------------------------------------------------------------------------------
def install() -> None:
    """A pause waits for no block that is read or written by another server."""
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(Scheduler, "has_finished_requests", _but_kept)


def _but_kept(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def has_finished_requests(self: Any) -> bool:
        waits = check(self)
        if not waits or self.finished_req_ids or not self.pause_state:
            return waits
        return any(request.is_finished() and not request.kv_transfer_params for request in self.requests.values())

    return has_finished_requests


# --- in a worker ------------------------------------------------------------------------------------------------------
def release(requests: Collection[str]) -> None:
    """Let these requests' blocks go, as if they had been fetched; those that were are passed over."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    for worker in _keeping(get_kv_transfer_group()):
        wrap(type(worker), "_get_new_notifs", _and_released)
        worker.__dict__.setdefault(RELEASED, set()).update(requests)


def _and_released(notified: Callable[[Any], set[str]]) -> Callable[[Any], set[str]]:
    def _get_new_notifs(self: Any) -> set[str]:
        done = notified(self)
        for name in self.__dict__.get(RELEASED, set()) & self._reqs_to_process:
            self._reqs_to_process.remove(name)
            self._reqs_to_send.pop(name, None)
            done.add(name)
        self.__dict__[RELEASED] = set()
        return done

    return _get_new_notifs


def _keeping(connector: Any) -> Iterator[Any]:
    """Workers of the connectors that keep prompts, among one or several."""
    for one in each(connector):
        worker = getattr(one, "connector_worker", None)
        if hasattr(worker, "_reqs_to_process"):
            yield worker
