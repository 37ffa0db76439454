"""Everything a run's config says about the model, built for serving. Called by `server.py`, in a thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import attrs
import torch
from prl.blocks import kernels, precision
from prl.providers import LanguageModel, Model, NumberFormat, WeightMap
from prl.serve.speech import Speech
from torch import nn

if TYPE_CHECKING:
    from prl.compose.compose import Composition


@attrs.frozen(kw_only=True)
class Loaded:
    """The model and how to talk to it."""

    speech: Speech
    module: nn.Module
    weight_map: WeightMap
    number_format: NumberFormat | None = None
    """What decodes received weights; None: they come as they are."""

    @property
    def model(self) -> LanguageModel:
        return cast(LanguageModel, self.module)


def load(composition: Composition) -> Loaded:
    """Build the model in the serving dtype, on the device the trainer is told to use."""
    run = composition.run
    provider = cast(Model, composition.provider(run.model))
    speech = Speech.of(composition)
    number_format: NumberFormat = composition.build(run.quantization)
    device = torch.device(_device(run.trainer.device))
    kernels.install(composition, device)
    with device:
        module: nn.Module = composition.build(run.model, speech.tokenizer.vocab_size)
    precision.cast(module, number_format.serve_dtype, float32=provider.float32)
    return Loaded(
        speech=speech,
        module=module.eval().requires_grad_(False),
        weight_map=composition.load(provider.weights)(run.model, speech.tokenizer.vocab_size),
        number_format=number_format,
    )


def _device(choice: str) -> str:
    if choice == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return choice
