"""CISPO (MiniMax-M1, arXiv:2506.13585): the ratio is clipped and detached, no token is masked out.

Imported by trainer ranks only.
"""

from __future__ import annotations

import torch
from prl.providers import LossFunction, LossInputs, LossOutput

from prl_cispo import CispoConfig


def build(config: CispoConfig) -> LossFunction:
    def cispo(inputs: LossInputs) -> LossOutput:
        in_stream = inputs.weights != 0
        trainer_logprobs = torch.where(in_stream, inputs.trainer_logprobs, 0.0)  # [N]
        ratio = torch.where(in_stream, trainer_logprobs.detach() - inputs.engine_logprobs, 0.0).exp()
        gain = ratio.clamp(max=config.clip_high) * inputs.advantages * trainer_logprobs
        clipped = in_stream & (ratio > config.clip_high)
        return LossOutput(loss=-(inputs.weights * gain).sum(), metrics={"clipped": clipped.float().sum()})

    return cispo
