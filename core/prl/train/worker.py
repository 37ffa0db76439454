"""One trainer rank: builds its part of the trainer, then does what the controller says.

    controller -> rank      TrainStep, Publish, Retire, Save, Stop
    rank -> controller      Hello, StepDone, Failed; Saved from the thread that writes checkpoints

Every rank receives the same messages in the same order (each with its own micro-batches), so that ranks meet in the
same collectives; each sends its share of the weights that engines fetch. Knows nothing of rollouts or rewards;
started by `prl.train.agent`.
"""

from __future__ import annotations

import functools
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from prl.blocks import checkpoint, kernels, rounding
from prl.blocks.precision import cast
from prl.columns import ColumnFolder
from prl.compose.compose import Composition
from prl.compose.config import Run
from prl.compose.routing import replayed
from prl.errors import PrlError, RunError, is_final
from prl.freed_memory import keep_freed
from prl.messages import Failed, Hello, Publish, Retire, Save, StepDone, Stop, TrainStep
from prl.providers import Loss, Model, NumberFormat, WeightMap, WeightTransport
from prl.rollout.tokenizer import vocab_size_of
from prl.run_dir import RunDir
from prl.score.costs import Costs
from prl.train import layers
from prl.train.checkpoint import TrainerState
from prl.train.export import Exporter, HuggingFaceExport, Shares
from prl.train.layout import layout_of
from prl.train.parallel.ranks import Ranks
from prl.train.routes import RouteReader
from prl.train.saver import Saver
from prl.train.step import Stepper, StepReport
from prl.train.streams import StreamLoss
from prl.train.survey import as_trained
from prl.train.throughput import Throughput
from prl.train.tracing import traced
from prl.types import STREAMS, Stream
from prl.wire import Connection

ORDERS = (TrainStep, Publish, Retire, Save, Stop)
_AGENT_SECONDS = 5.0
"""After so long it is not a peer's death that this rank failed of."""


def main(composition: Composition, run_dir: RunDir) -> int:
    """Run one rank to the end of the run; rank and world size come from the elastic agent's environment."""
    keep_freed()
    torch.set_num_threads(composition.run.trainer.threads)
    ranks = Ranks.join(composition.run.trainer.device, layout_of(composition.run.trainer))
    connection = Connection(run_dir, f"trainer-{ranks.rank}")
    try:
        rank = build(composition, run_dir, ranks, connection)
        rank.serve()
    except Exception as error:
        reason = str(error) if isinstance(error, PrlError) else f"{type(error).__name__}: {error}"
        if ranks.world_size > 1 and not isinstance(error, PrlError):
            # A peer that died breaks the collective this rank is in: the agent knows who was first, and ends the rest.
            time.sleep(_AGENT_SECONDS)
        connection.send(Failed(error=reason, fatal=is_final(error)))
        raise
    finally:
        connection.close()
    kernels.release()
    ranks.leave()
    return 0


@attrs.define(kw_only=True, eq=False)
class TrainerRank:
    """A rank that is ready to train."""

    ranks: Ranks
    connection: Connection
    stepper: Stepper
    throughput: Throughput
    state: TrainerState
    exporter: Exporter
    saver: Saver
    huggingface: HuggingFaceExport | None
    """None: checkpoints hold what a run continues from, and nothing else."""
    version: int
    """Policy version of the weights it holds."""
    costs: Costs
    """Of a sequence: the controller packs by it."""
    _waited: float = 0.0

    def serve(self) -> None:
        """Say hello, then obey until Stop."""
        self.connection.send(
            Hello(
                role="trainer",
                index=self.ranks.rank,
                pid=os.getpid(),
                host=socket.gethostname(),
                world_size=self.ranks.world_size,
                version=self.version,
                costs=self.costs,
            )
        )
        try:
            while self._obey(self._next_order()):
                pass
        finally:
            self.saver.close()
            self.exporter.close()

    def _next_order(self) -> Any:
        started = time.perf_counter()
        order = self.connection.receive(ORDERS)
        self._waited += time.perf_counter() - started
        return order

    def _obey(self, order: Any) -> bool:
        """False when it was the last."""
        match order:
            case TrainStep():
                self._report(self._train(order), step=order.batch.step, publish=order.publish)
            case Publish():
                self._report(StepReport(sums={}, values={}, seconds={}), step=self.version, publish=True)
            case Retire():
                self.exporter.retire(order.version)
            case Save():
                self._save(order.step, Path(order.path))
        return not isinstance(order, Stop)

    def _train(self, order: TrainStep) -> StepReport:
        batch = order.batch
        if batch.version != self.version:
            raise RunError(f"step {batch.step} trains version {batch.version}, and this rank holds {self.version}")
        with traced(order.trace, self.ranks.rank):
            report = self.stepper.step(batch, batch.ranks[0], order.learning_rate)
        self.version += 1
        return attrs.evolve(
            report,
            sums={**report.sums, **self.throughput.sums(batch.ranks[0])},
            values={**report.values, **self.throughput.values()},
            peaks=self.throughput.peaks(),
        )

    def _save(self, step: int, path: Path) -> None:
        snapshot = self.state.snapshot(step=step, version=self.version)
        writes: list[Callable[[Path], object]] = []
        if self.huggingface is not None:
            writes.append(functools.partial(self.huggingface.write, self.huggingface.collect(path)))
        self.saver.start(snapshot, path, *writes)

    def _report(self, report: StepReport, *, step: int, publish: bool) -> None:
        started = time.perf_counter()
        manifest = self.exporter.publish(self.version) if publish else None
        seconds = {"wait": self._waited, **report.seconds, "publish": time.perf_counter() - started}
        self._waited = 0.0
        self.connection.send(
            StepDone(
                step=step,
                version=self.version,
                sums=report.sums,
                values=report.values,
                seconds=seconds,
                peaks=report.peaks,
                manifest=manifest,
            )
        )


# --- building ---------------------------------------------------------------------------------------------------------
def build(composition: Composition, run_dir: RunDir, ranks: Ranks, connection: Connection) -> TrainerRank:
    """Model, optimizer, losses and transport of this rank, restored from a checkpoint where the run names one."""
    run = composition.run
    kernels.install(composition, ranks.device)
    vocab_size = vocab_size_of(composition)
    weight_map = composition.load(_model_provider(composition).weights)(run.model, vocab_size)
    number_format = composition.build(run.quantization)
    model = _build_model(composition, ranks, vocab_size, weight_map, number_format)
    optimizer = composition.build(run.optimizer, model.named_parameters(), run.optimizer.learning_rate)
    state = TrainerState(
        model=model, optimizer=optimizer, rank=ranks.rank, world_size=ranks.world_size, seed=run.run.seed
    )
    shares = Shares(model=model, weight_map=weight_map, rank=ranks.rank, ranks=ranks.world_size)
    version = state.load(Path(run.checkpoints.resume)) if run.checkpoints.resume else 0
    # Of a model without data, because parts of the real one may be elsewhere.
    throughput = Throughput(survey=as_trained(composition, vocab_size), device=ranks.device)
    return TrainerRank(
        ranks=ranks,
        connection=connection,
        stepper=Stepper(
            model=model,
            optimizer=optimizer,
            losses=_losses(composition),
            logprob_chunk=run.trainer.logprob_chunk,
            max_grad_norm=run.trainer.max_grad_norm,
            device=ranks.device,
            compiled=run.trainer.compile,
            optimizer_offload=run.trainer.optimizer_offload,
            context=ranks.context,
            routes=_routes(composition, run_dir),
        ),
        throughput=throughput,
        state=state,
        exporter=Exporter(
            shares=shares,
            number_format=number_format,
            float32=_model_provider(composition).float32,
            unquantized=_model_provider(composition).unquantized,
            sender=_sender(composition, run_dir, ranks.rank),
        ),
        saver=Saver(functools.partial(Connection, run_dir, f"trainer-{ranks.rank}-checkpoints")),
        huggingface=_huggingface(run, shares, number_format) if run.checkpoints.huggingface else None,
        version=version,
        costs=throughput.costs(run.rollouts.sequence_length, run.trainer.costs),
    )


def _model_provider(composition: Composition) -> Model:
    provider = composition.provider(composition.run.model)
    assert isinstance(provider, Model)
    return provider


def _build_model(
    composition: Composition, ranks: Ranks, vocab_size: int, weight_map: WeightMap, number_format: NumberFormat
) -> nn.Module:
    """From the same seed on every rank, then divided; or divided while empty, and each rank's part read from files."""
    run = composition.run
    torch.manual_seed(run.run.seed)
    with torch.device("meta") if run.trainer.initial_weights else ranks.device:
        model: nn.Module = composition.build(run.model, vocab_size)
    cast(model, number_format.train_dtype, float32=_model_provider(composition).float32)
    if number_format.fake_quantization:
        rounding.install(model, weight_map, number_format, unquantized=_model_provider(composition).unquantized)
    layers.apply(model, run.trainer)
    ranks.shard(model)
    if run.trainer.initial_weights:
        model.to_empty(device=ranks.device)
        checkpoint.load(model, weight_map, Path(run.trainer.initial_weights), number_format=number_format)
    return model


def _huggingface(run: Run, shares: Shares, number_format: NumberFormat) -> HuggingFaceExport:
    return HuggingFaceExport(
        shares=shares,
        owners=shares.owners() if shares.ranks > 1 else {},
        tokenizer=Path(run.tokenizer.file) if run.tokenizer.file else None,
        origin=Path(run.trainer.initial_weights) if run.trainer.initial_weights else None,
        origin_format=number_format,
    )


def _routes(composition: Composition, run_dir: RunDir) -> RouteReader | None:
    routing = replayed(composition)
    return None if routing is None else RouteReader(folder=ColumnFolder(run_dir.columns), routing=routing)


def _losses(composition: Composition) -> dict[Stream, StreamLoss]:
    sections = {stream: getattr(composition.run.losses, stream) for stream in STREAMS}
    return {stream: _stream_loss(composition, section) for stream, section in sections.items() if section is not None}


def _stream_loss(composition: Composition, section: Any) -> StreamLoss:
    provider = composition.provider(section)
    assert isinstance(provider, Loss)
    return StreamLoss(function=composition.build(section), needs=provider.needs)


def _sender(composition: Composition, run_dir: RunDir, rank: int) -> Any:
    provider = composition.provider(composition.run.weights)
    assert isinstance(provider, WeightTransport)
    return composition.load(provider.send)(composition.run.weights, run_dir.path, rank)
