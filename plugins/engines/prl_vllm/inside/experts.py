"""Experts on vLLM's CPU backend in plain torch, for what its kernels do not compute: no gate, relu squared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts


class PlainExperts(CPUUnquantizedExperts):
    """One expert after the other; weights stay as they were loaded."""

    packed = False

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation == MoEActivation.RELU2_NO_MUL

    @classmethod
    def _supports_grouped_gemm(cls, moe_config: Any) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing is packed."""

    def apply(
        self,
        output: Tensor,  # [T, D]
        hidden_states: Tensor,  # [T, D]
        w1: Tensor,  # [experts here, F, D]
        w2: Tensor,  # [experts here, D, F]
        topk_weights: Tensor,  # [T, K]
        topk_ids: Tensor,  # [T, K] global numbers
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: Tensor | None,  # [experts] place here, -1 elsewhere
        *unused: Any,
        **quantization: Any,
    ) -> None:
        here = topk_ids.long() if expert_map is None else expert_map[topk_ids.long()]
        output.zero_()
        for expert, (up, down) in enumerate(zip(w1, w2, strict=True)):
            tokens, choice = (here == expert).nonzero(as_tuple=True)
            inner = torch.relu(hidden_states[tokens] @ up.T).square() @ down.T
            output.index_add_(0, tokens, inner * topk_weights[tokens, choice, None].to(inner.dtype))
