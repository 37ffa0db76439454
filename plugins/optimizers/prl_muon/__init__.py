"""The Muon optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from attrs import validators
from prl import hookimpl, option
from prl.compose.config import OptimizerConfig
from prl.providers import Optimizer

_share = validators.and_(validators.ge(0.0), validators.lt(1.0))


@attrs.frozen(kw_only=True)
class MuonConfig(OptimizerConfig):
    """`[optimizer]` with `type = "muon"`; one learning rate for matrices and the rest."""

    momentum: float = option(0.95, help="decay rate of the running mean of a matrix's gradient", validator=_share)
    iterations: int = option(5, help="Newton-Schulz iterations", validator=validators.gt(0))
    weight_decay: float = option(0.01, help="decoupled decay of matrices", validator=validators.ge(0))
    betas: tuple[float, float] = option(
        (0.9, 0.999), help="AdamW's, for what is no matrix of a layer", validator=validators.deep_iterable(_share)
    )
    eps: float = option(1e-8, help="AdamW's", validator=validators.gt(0))


@hookimpl
def prl_optimizers() -> Iterable[Optimizer]:
    yield Optimizer(
        name="muon",
        config=MuonConfig,
        summary="orthogonalised momentum for the matrices of layers, AdamW for everything else",
        build="prl_muon.muon:build",
    )
