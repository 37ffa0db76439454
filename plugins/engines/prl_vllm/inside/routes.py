"""Expert choices of every token on vLLM's CPU backend, through vLLM's own field for them.

Upstream reports routes through its second model runner, which needs Triton and so no CPU has: `vllm/v1/worker/
cpu_model_runner.py` is of the first. Here the routers' own capture hook fills a table with one row for each slot of the
KV cache: what is reused, preempted or computed in chunks is found where its keys and values are. It goes when the CPU
backend reports routes by itself; elsewhere `--enable-return-routed-experts` is used and nothing here runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from prl_vllm.inside.mends import wrap

FIELD = "prl_routes"
"""Attribute of the model runner's output that carries {request: rows} to the scheduler."""


@attrs.define(eq=False)
class Recorder:
    """The routes of one worker's model."""

    table: NDArray[Any]  # [KV slots, layers, experts per token]
    block_size: int
    group: int
    """Which of the KV cache's groups has a slot for every token."""
    step: dict[int, NDArray[Any]] = attrs.field(factory=dict)
    """Layer -> [tokens of the step, experts per token]."""
    sent: dict[str, int] = attrs.field(factory=dict)
    """Request -> rows that the scheduler has."""
    ready: dict[str, NDArray[Any]] = attrs.field(factory=dict)

    @property
    def pages(self) -> NDArray[np.int8]:
        """[blocks, bytes] the table as one more tensor of the KV cache."""
        return self.table.view(np.int8).reshape(len(self.table) // self.block_size, -1)

    def slots(self, blocks: NDArray[Any], first: int, end: int) -> NDArray[Any]:
        tokens = np.arange(first, end)
        slots: NDArray[Any] = blocks[tokens // self.block_size] * self.block_size + tokens % self.block_size
        return slots

    def record(self, runner: Any, scheduled: Any) -> None:
        """Take in a step that was computed."""
        at, batch = 0, runner.input_batch
        self.sent = {name: count for name, count in self.sent.items() if name in runner.requests}
        for index, name in enumerate(batch.req_ids):
            count = scheduled.num_scheduled_tokens.get(name, 0)
            if not count:
                continue
            first = int(batch.num_computed_tokens_cpu[index])
            blocks = np.asarray(runner.requests[name].block_ids[self.group])
            new = self.slots(blocks, first, first + count)
            for layer, chosen in self.step.items():
                self.table[new, layer] = chosen[at : at + count]
            at += count
            known = self.sent.get(name, 0)
            if first + count > known:
                self.ready[name] = self.table[self.slots(blocks, known, first + count)]
                self.sent[name] = first + count
        self.step.clear()


recorder: Recorder | None = None
"""Of this process's model, from its first step on."""


def install() -> None:
    """Record routes in this process's model runner, and hand them on in its scheduler."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "execute_model", _recording)
    wrap(GPUModelRunner, "sample_tokens", lambda sample: lambda self, *a, **k: _attached(self, sample(self, *a, **k)))
    wrap(Scheduler, "update_from_output", _handing_on)


def _recording(execute: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        global recorder
        if not hasattr(self, "prl_recorder"):
            self.prl_recorder = recorder = _bound(self)
        output = execute(self, scheduled, *args, **kwargs)
        if recorder is not None and recorder.step and scheduled.total_num_scheduled_tokens:
            recorder.record(self, scheduled)
        return _attached(self, output)

    return execute_model


def _attached(runner: Any, output: Any) -> Any:
    recorder: Recorder | None = getattr(runner, "prl_recorder", None)
    if recorder is not None and recorder.ready and hasattr(output, "req_ids"):
        setattr(output, FIELD, dict(recorder.ready))
        recorder.ready.clear()
    return output


def _handing_on(update: Callable[..., Any]) -> Callable[..., Any]:
    def update_from_output(self: Any, scheduled: Any, output: Any) -> Any:
        outputs = update(self, scheduled, output)
        waiting: dict[str, list[NDArray[Any]]] = self.__dict__.setdefault("prl_routes_waiting", {})
        for name, rows in getattr(output, FIELD, {}).items():
            waiting.setdefault(name, []).append(rows)
        for client in outputs.values():
            for entry in client.outputs:
                if rows_of := waiting.pop(entry.request_id, None):
                    entry.routed_experts = np.concatenate(rows_of)
        for name in [name for name in waiting if name not in self.requests]:
            del waiting[name]
        return outputs

    return update_from_output


def _bound(runner: Any) -> Recorder | None:
    """A recorder that the model's routers write to; None for a model without any."""
    from vllm.v1.kv_cache_interface import AttentionSpec

    model: nn.Module = runner.get_model()
    routed = {m.layer_id: m.router for m in model.modules() if hasattr(getattr(m, "router", None), "set_capture_fn")}
    if not routed:
        return None
    config, text = runner.kv_cache_config, runner.vllm_config.model_config
    group = next(i for i, g in enumerate(config.kv_cache_groups) if isinstance(g.kv_cache_spec, AttentionSpec))
    size = config.kv_cache_groups[group].kv_cache_spec.block_size
    shape = (config.num_blocks * size, text.get_total_num_hidden_layers(), text.get_num_experts_per_tok())
    recorder = Recorder(np.zeros(shape, np.uint8 if text.get_num_experts() <= 256 else np.uint16), size, group)

    def capture(layer: int) -> Callable[[Tensor], None]:
        def take(chosen: Tensor) -> None:
            recorder.step[layer] = chosen.numpy().copy()

        return take

    for layer, router in routed.items():
        router.set_capture_fn(capture(layer))
    return recorder
