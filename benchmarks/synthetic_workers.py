"""Workers with nothing behind them, for controller_scale.py: they answer what a controller asks over its real socket.

    python -m benchmarks.synthetic_workers RUN --role environment --index 0 --seconds 1.0 --tokens 320
    python -m benchmarks.synthetic_workers RUN --role trainer

An environment worker answers a group after 0.9 to 1.1 times `--seconds`; with `--large` bytes per rollout it also
writes a column of that size, which travels by reference. The trainer answers a step at once, and reads and verifies
the large columns of its samples first. `Stop` ends either.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
from pathlib import Path

import attrs
import numpy as np
from prl.columns import ColumnFolder
from prl.messages import TO_WORKER, Cancel, GroupDone, Hello, Publish, RunGroup, Save, Saved, StepDone, Stop, TrainStep
from prl.run_dir import RunDir
from prl.types import Group, Manifest, MicroBatch, Rollout, StopReason, TensorRecord, Turn
from prl.wire import AsyncConnection, Connection

PROMPT_TOKENS = 64
LAYERS = 75  # of the mixture-of-experts model whose routes stand behind `--large`
TASKS = 1_000_000_000


# --- environment ------------------------------------------------------------------------------------------------------
@attrs.define(kw_only=True)
class SyntheticEnvironment:
    """Rollouts that differ in nothing but their names, version and reward."""

    folder: ColumnFolder
    seconds: float
    tokens: int
    large: int
    _template: Rollout = attrs.field(init=False)
    _running: dict[int, asyncio.Task[None]] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        sampled = np.arange(self.tokens) >= PROMPT_TOKENS
        self._template = Rollout(
            rollout_id="",
            tokens=np.arange(self.tokens, dtype=np.int32) % 50_000,
            sampled=sampled,
            logprobs=np.where(sampled, -0.5, 0.0).astype(np.float32),
            versions=np.full(self.tokens, -1, dtype=np.int32),
            temperature=1.0,
            turns=(Turn(start=PROMPT_TOKENS, end=self.tokens, stop=StopReason.STOP),),
            messages=({"role": "user", "content": "?" * 200}, {"role": "assistant", "content": "!" * 1000}),
            reward=0.0,
        )

    async def serve(self, connection: AsyncConnection) -> None:
        async with asyncio.TaskGroup() as tasks:
            while not isinstance(message := await connection.receive(TO_WORKER), Stop):
                if isinstance(message, RunGroup):
                    self._running[message.request] = tasks.create_task(self._run(connection, message))
                elif isinstance(message, Cancel) and message.request in self._running:
                    self._running.pop(message.request).cancel()
            for task in self._running.values():
                task.cancel()

    async def _run(self, connection: AsyncConnection, request: RunGroup) -> None:
        await asyncio.sleep(self.seconds * random.uniform(0.9, 1.1))
        rollouts = tuple([await self._rollout(request, member) for member in range(request.size)])
        group = Group(
            group_id=request.group_id,
            task=request.task,
            attempt=request.attempt,
            started_version=request.version,
            rollouts=rollouts,
        )
        await connection.send(GroupDone(request=request.request, group=group))
        del self._running[request.request]

    async def _rollout(self, request: RunGroup, member: int) -> Rollout:
        large = await asyncio.to_thread(self._write, request, member) if self.large else {}
        return attrs.evolve(
            self._template,
            rollout_id=f"{request.group_id}.{member}",
            versions=np.where(self._template.sampled, request.version, -1).astype(np.int32),
            reward=float(random.random() < 0.5),
            large=large,
        )

    def _write(self, request: RunGroup, member: int):
        routes = np.zeros((self.tokens, LAYERS, self.large // (self.tokens * LAYERS)), dtype=np.uint8)
        routes.reshape(-1)[:8] = np.frombuffer(member.to_bytes(8, "little"), np.uint8)  # members are not alike
        return self.folder.write({"routes": routes}, group_id=request.group_id, attempt=request.attempt)


async def environment(run_dir: RunDir, options: argparse.Namespace) -> None:
    connection = AsyncConnection(run_dir, f"environment-{options.index}")
    sizes = {"toy/train": TASKS, "toy/eval": 0}
    await connection.send(Hello(role="environment", index=options.index, pid=os.getpid(), host="here", sizes=sizes))
    worker = SyntheticEnvironment(
        folder=ColumnFolder(run_dir.columns), seconds=options.seconds, tokens=options.tokens, large=options.large
    )
    await worker.serve(connection)
    connection.close()


# --- trainer and engine -----------------------------------------------------------------------------------------------
def trainer(run_dir: RunDir) -> None:
    connection = Connection(run_dir, "trainer-0")
    connection.send(Hello(role="trainer", index=0, pid=os.getpid(), host="here"))
    version, folder = 0, ColumnFolder(run_dir.columns)
    while not isinstance(message := connection.receive(TO_WORKER), Stop):
        if isinstance(message, TrainStep):
            version += 1
            read = sum(_read(folder, micro) for micro in message.batch.ranks[0])
            connection.send(_done(version, read))
        elif isinstance(message, Publish):
            connection.send(_done(version, 0))
        elif isinstance(message, Save):
            Path(message.path).mkdir(parents=True)
            connection.send(Saved(step=message.step, rank=0, files={}))
    connection.close()


def _read(folder: ColumnFolder, micro: MicroBatch) -> int:
    """Bytes of the large columns of a micro-batch, every one of them verified."""
    references = [reference for column in micro.large.values() for pieces in column for reference in pieces]
    return sum(folder.read(reference).nbytes for reference in references)


def _done(version: int, read: int) -> StepDone:
    record = TensorRecord(name="w", dtype="float32", shape=(1,), offset=0, nbytes=4, checksum=0)
    manifest = Manifest.single(version=version, location="nowhere", tensors=(record,))
    values = {"large_bytes": float(read)}
    return StepDone(step=version, version=version, sums={}, values=values, seconds={"wait": 0.0}, manifest=manifest)


def engine(run_dir: RunDir, index: int) -> None:
    """Says where it is and waits for the end; what it would serve is `SyntheticEngine` in the controller's loop."""
    connection = Connection(run_dir, f"engine-{index}")
    connection.send(Hello(role="engine", index=index, pid=os.getpid(), host="here", url=f"engine-{index}"))
    while not isinstance(connection.receive(TO_WORKER), Stop):
        pass
    connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--role", choices=("environment", "trainer", "engine"), required=True)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1.0, help="mean time of a group")
    parser.add_argument("--tokens", type=int, default=320, help="tokens of a rollout, 64 of them prompt")
    parser.add_argument("--large", type=int, default=0, help="bytes of a rollout that travel by reference")
    options = parser.parse_args()
    run_dir = RunDir(options.run)
    if options.role == "environment":
        asyncio.run(environment(run_dir, options))
    elif options.role == "trainer":
        trainer(run_dir)
    else:
        engine(run_dir, options.index)


if __name__ == "__main__":
    main()
