"""Part `steps` of benchmarks/deepep_gpu.py: a toy mixture in the trainer's own steps, by all-to-all and by DeepEP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from prl.blocks.kernels import SEAMS
from prl.compose.config import TrainerSection
from prl.train.layout import Layout
from prl.train.parallel.ranks import Ranks
from prl.train.step import Stepper
from prl.train.streams import StreamLoss
from prl_deepep.kernel import dispatch
from prl_policy_gradient import DppoConfig
from prl_policy_gradient.losses import dppo
from prl_qwen3 import Qwen3Config
from prl_qwen3.network import build as qwen3
from torch import Tensor

from benchmarks.meshes_speed_gpu import Case, batch_of, model_of
from benchmarks.train_gpu import OPTIMIZERS
from tests.train.tiny import GradientRecorder, relative_difference

VOCAB = 512
MODEL = Qwen3Config(
    hidden_size=512,
    layers=4,
    heads=8,
    kv_heads=4,
    head_dim=64,
    experts=16,
    experts_per_token=4,
    expert_intermediate_size=256,
)
STEPS, RATE = 8, 1e-4


@attrs.frozen(kw_only=True)
class Run:
    layout: Layout
    deepep: bool
    checkpointing: str = "none"
    exact: bool = False
    """In float32."""

    @property
    def name(self) -> str:
        axes = [f"{axis} {getattr(self.layout, axis)}" for axis in ("shard", "context", "expert")]
        divided = ", ".join(axis for axis in axes if not axis.endswith(" 1"))
        way = "DeepEP" if self.deepep else "all-to-all"
        return f"{divided}, {way}, checkpointing {self.checkpointing}{', float32' * self.exact}"


def steps(add: Callable[..., None], rank: int, device: str, layouts: Sequence[Layout]) -> None:
    """Every run beside the first of its layout, by all-to-all, and beside the same in float32: gradients of the first
    batch and, trained, the sums of every step.

    In a deep model routers choose otherwise for a few tokens where numbers are rounded otherwise, so how far both ways
    are from float32 is what can be compared.
    """
    for layout in layouts:
        ways = [
            Run(layout=layout, deepep=way, checkpointing=again) for again in ("none", "full") for way in (False, True)
        ]
        exactly, _ = _gradients(Run(layout=layout, deepep=False, exact=True), rank, device)
        expected: dict[str, Tensor] = {}
        for run in [*ways, Run(layout=attrs.evolve(layout, expert=1), deepep=False)]:
            found, norm = _gradients(run, rank, device)
            expected = expected or found
            add(
                **{
                    run.name: {
                        "gradients_apart": _together(found, expected),
                        "largest_apart": relative_difference(found, expected),
                        "from_float32": _together(found, exactly),
                        "largest_from_float32": relative_difference(found, exactly),
                        "norm_of_the_first": norm,
                        **_trained(run, rank, device),
                    }
                }
            )


def _together(seen: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The norm of all differences over the norm of all that is expected."""
    apart = sum(float((seen[name].double() - expected[name].double()).square().sum()) for name in expected)
    whole = sum(float(tensor.double().square().sum()) for tensor in expected.values())
    return float((apart / whole) ** 0.5)


def _gradients(run: Run, rank: int, device: str) -> tuple[dict[str, Tensor], float]:
    stepper, case, ranks = _stepper(run, rank, device, lambda model: GradientRecorder(model.named_parameters()))
    batch = batch_of(case, VOCAB, 0, 0)
    norm = _step(run, stepper, batch, ranks, 0.0).values["grad_norm"]
    found: dict[str, Tensor] = stepper.optimizer.gradients  # type: ignore[attr-defined]
    return {name: gradient.float() for name, gradient in found.items()}, norm


def _trained(run: Run, rank: int, device: str) -> dict[str, Any]:
    stepper, case, ranks = _stepper(run, rank, device, lambda m: OPTIMIZERS["adamw"](m.named_parameters()))
    reports = [_step(run, stepper, batch_of(case, VOCAB, number, 0), ranks, RATE) for number in range(STEPS)]
    return {
        "grad_norm": [report.values["grad_norm"] for report in reports],
        "loss": [report.sums.get("loss/rl", 0.0) for report in reports],
    }


def _step(run: Run, stepper: Stepper, batch: Any, ranks: Ranks, rate: float) -> Any:
    SEAMS["dispatch"].chosen = dispatch if run.deepep else SEAMS["dispatch"].reference
    try:
        return stepper.step(batch, batch.ranks[ranks.rank], rate)
    finally:
        SEAMS["dispatch"].chosen = SEAMS["dispatch"].reference


def _stepper(
    run: Run, rank: int, device: str, optimizer: Callable[[Any], torch.optim.Optimizer]
) -> tuple[Stepper, Case, Ranks]:
    length = 1024 if device == "cuda" else 64
    case = Case(
        model="mixture",
        build=lambda: qwen3(MODEL, VOCAB),
        layout=run.layout,
        length=length,
        documents=2,
        checkpointing=run.checkpointing,
        optimizer="adamw",
    )
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    ranks = Ranks.laid_out(rank, place, run.layout)
    model = model_of(case, ranks, TrainerSection(activation_checkpointing=run.checkpointing), exact=run.exact)  # type: ignore[arg-type]
    stepper = Stepper(
        model=model,
        optimizer=optimizer(model),
        losses={"rl": StreamLoss(function=dppo(DppoConfig()))},
        logprob_chunk=1024,
        max_grad_norm=1.0,
        device=place,
        context=ranks.context,
    )
    return stepper, case, ranks
