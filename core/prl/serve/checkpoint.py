"""A checkpoint of a run, served by an engine of its own: a version that stays, whatever the run goes on to do.

    huggingface/ of the checkpoint ──► the run's number format ──► its weight transport ──► an engine in this process

The engine is what the run's config says, one of it; its run directory is a temporary one inside the run's. Nothing else
of the run is read or changed. Called by `prl serve`.
"""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from prl import checkpoint_dir
from prl.checkpoint_dir import CheckpointManifest
from prl.compose import origin
from prl.compose.compose import Composition, compose, create_run
from prl.errors import CheckpointError, UserError
from prl.providers import Engine, Model, WeightSender, WeightTransport
from prl.rollout.tokenizer import vocab_size_of
from prl.run_dir import RunDir
from prl.weights import engines
from prl.weights.engines import Duty

if TYPE_CHECKING:
    from torch import Tensor

ALONE = ("engine.count=1", "engine.nodes=1")
WEIGHTS = "huggingface"

Tell = Callable[[str, str, Path], None]
"""(name of the model, URL, file of the key), once the version is served."""


def serve(
    run_dir: RunDir, *, step: int | None = None, plugins: str = "", overrides: Sequence[str] = (), tell: Tell
) -> None:
    """Serve the newest checkpoint of a run, or that of `step`, until interrupted or until the engine ends.

    UserError, ConfigError or CheckpointError say why it cannot be.
    """
    folder = _chosen(run_dir, step)
    within = run_dir.path / "serving"
    within.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=within) as place:
        here = RunDir(place)
        where = f'run.dir="{here.path}"'
        composition = compose(run_dir.config, plugins=plugins, overrides=[*ALONE, *overrides, where])
        manifest = _checked(composition, folder)
        create_run(composition, run_dir.config, here)
        asyncio.run(_serve(composition, here, folder, manifest.step, tell))


def _chosen(run_dir: RunDir, step: int | None) -> Path:
    found = {checkpoint_dir.step_of(path): path for path in checkpoint_dir.complete(run_dir.checkpoints)}
    if not found:
        raise UserError(f"{run_dir.path} has no checkpoint yet; checkpoints.every makes them")
    chosen = max(found) if step is None else step
    if chosen not in found:
        raise UserError(f"{run_dir.path} has no checkpoint of step {chosen}; there are {', '.join(map(str, found))}")
    return found[chosen]


def _checked(composition: Composition, folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint whose weights are there and this model's."""
    manifest = checkpoint_dir.read_manifest(folder)
    checkpoint_dir.check_identity(folder, manifest, origin.identity(composition))
    if not (folder / WEIGHTS).is_dir():
        raise CheckpointError(f"{folder} has no folder {WEIGHTS}: checkpoints.huggingface left it out of this run")
    return manifest


async def _serve(composition: Composition, run_dir: RunDir, folder: Path, version: int, tell: Tell) -> None:
    run = composition.run
    engine = cast(Engine, composition.provider(run.engine))
    transport = cast(WeightTransport, composition.provider(run.weights))
    sender: WeightSender = composition.load(transport.send)(run.weights, run_dir.path, 0)

    async def announce(url: str) -> None:
        client = composition.load(engine.connect)(url, run_dir.token())
        manifest = await asyncio.to_thread(sender.send, version, _weights(composition, folder))
        await client.prepare(manifest)
        await client.commit(version)
        await client.aclose()
        sender.retire(version)
        tell(f"{composition.provider(run.model).name}@{version}", url, run_dir.path / "token")

    duty = Duty(role="engine", number=0, engine=0)
    serving = asyncio.ensure_future(engines.serve(composition, run_dir, duty, announce))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
    try:
        await serving
    except asyncio.CancelledError:
        if not serving.cancelled():  # the user's interruption, and not SIGTERM's
            raise
    finally:
        sender.close()


def _weights(composition: Composition, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """What the trainer published of this version, from what it keeps of it."""
    from prl.blocks.form import Form
    from prl.blocks.tensor_folder import StoredTensors

    run, provider = composition.run, cast(Model, composition.provider(composition.run.model))
    form = Form.of_family(provider, composition.build(run.quantization))
    carried = tuple(composition.load(provider.weights)(run.model, vocab_size_of(composition)).carried)
    for name, tensor in StoredTensors(folder / WEIGHTS).items():
        if not name.startswith(carried):
            yield from form.apply(name, tensor)
