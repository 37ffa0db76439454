"""What sequences compute after an update is kept from the tiers behind the KV cache, on every platform.

A sequence that goes on under new weights has keys and values of both; its blocks are still named after the weights it
was sent under. In one server nothing is sent under those any more, but host memory and disk may be read by an engine
that has not been updated yet, or is started again. Upstream stores such blocks: its cache does not ask which weights
computed a block (`vllm/distributed/kv_transfer/kv_connector/v1/offloading/scheduler.py`). It goes when a change of the
version there ends what running requests store. Releases that tell no versions have no such change: there no sequence
goes on through an update (`segments.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prl_vllm.inside.mends import wrap
from prl_vllm.release import tells_versions


def install() -> None:
    """Cut what every request stores when the version changes."""
    from vllm.v1.engine.core import EngineCore

    if tells_versions():
        wrap(EngineCore, "set_weight_version", _cutting)


def _cutting(change: Callable[..., None]) -> Callable[..., None]:
    def set_weight_version(self: Any, version: str) -> None:
        for connector in _tiers(self.scheduler.connector):
            for stored in connector.connector_scheduler._req_status.values():
                stored.max_offload_tokens = min(
                    stored.max_offload_tokens if stored.max_offload_tokens is not None else stored.req.num_tokens,
                    stored.req.num_computed_tokens,
                )
        change(self, version)

    return set_weight_version


def _tiers(connector: Any) -> Iterator[Any]:
    """The connectors that have tiers, among one or several."""
    for one in getattr(connector, "sub_connectors", [connector]):
        if type(one).__name__ == "OffloadingConnector":
            yield one
