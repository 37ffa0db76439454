"""What is finished of groups in flight: a checkpoint keeps it, and a resumed run does not sample it again.

    in flight ── every turn's tokens so far ──► a file of the checkpoint
    resumed   ── the environment says the same again, and the policy has said already what it answers

Half of a rollout is a coroutine of its environment, which no file can hold. So the environment is run again from its
beginning, and every turn whose prompt has the very tokens it had then is answered from the file; a turn that was cut
short is sampled on from its last token, each token under the version that sampled it. Where an environment goes another
way than it did, what is left of the record is dropped. Written and read by the group runner, never by the controller.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import attrs
import numpy as np

from prl import wire
from prl.checkpoint_dir import RecordedFile
from prl.errors import CheckpointError
from prl.routes import joined, until
from prl.types import Carried, Completion, Int32, Sampling, StopReason


@attrs.frozen(kw_only=True)
class CarriedRollout:
    """The turns of one rollout; the last may be unfinished, its stop reason is then ABORT."""

    member: int
    tokens: Int32  # [L] the conversation up to its last sampled token
    starts: tuple[int, ...]
    """Turn by turn, the place of its first sampled token."""
    completions: tuple[Completion, ...]

    def turn(self, number: int, prompt: Sequence[int]) -> Completion | None:
        """What the policy said in a turn, if it was asked the same."""
        if number >= len(self.starts) or self.starts[number] != len(prompt):
            return None
        return self.completions[number] if np.array_equal(self.tokens[: len(prompt)], prompt) else None


@attrs.frozen(kw_only=True)
class CarriedGroup:
    """Those members of a group that have any token."""

    sampling: Sampling
    rollouts: tuple[CarriedRollout, ...]

    @property
    def oldest_version(self) -> int:
        return min(int(c.versions[0]) for rollout in self.rollouts for c in rollout.completions)


# --- completions ------------------------------------------------------------------------------------------------------
def sampled_until(completion: Completion, version: int, *, prompt: int) -> Completion | None:
    """The tokens that no version after `version` sampled; `prompt` is the number of tokens before them."""
    count = int(np.searchsorted(completion.versions, version, side="right"))
    if count == len(completion.tokens):
        return completion if count else None
    if not count:
        return None
    return attrs.evolve(
        completion,
        tokens=completion.tokens[:count],
        logprobs=completion.logprobs[:count],
        versions=completion.versions[:count],
        stop=StopReason.ABORT,
        routes=until(completion.routes, prompt + count - 1),  # the last token was not computed yet
    )


def continued(begun: Completion, rest: Completion) -> Completion:
    """A turn of which `begun` was sampled before `rest`."""
    return Completion(
        tokens=np.concatenate([begun.tokens, rest.tokens]),
        logprobs=np.concatenate([begun.logprobs, rest.logprobs]),
        versions=np.concatenate([begun.versions, rest.versions]),
        stop=rest.stop,
        routes=joined(begun.routes, rest.routes),
    )


# --- files ------------------------------------------------------------------------------------------------------------
def write(path: Path, groups: Iterable[tuple[int, int, CarriedGroup]]) -> tuple[Carried, ...]:
    """Write (group id, attempt, what is finished) into a new file, to the disk; where each lies in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    with RecordedFile(path) as file:
        for group_id, attempt, group in groups:
            start = file.tell()
            for frame in wire.join(wire.encode(group)):
                file.write(frame)
            written.append(
                Carried(
                    group_id=group_id,
                    attempt=attempt,
                    oldest_version=group.oldest_version,
                    file=str(path),
                    offset=start,
                    nbytes=file.tell() - start,
                )
            )
    return tuple(written)


def read(carried: Carried) -> CarriedGroup:
    """CheckpointError when it is not there, or something else."""
    try:
        with Path(carried.file).open("rb") as file:
            file.seek(carried.offset)
            content = memoryview(file.read(carried.nbytes))
        (frames,) = wire.split(content)
        group: CarriedGroup = wire.decode(frames, (CarriedGroup,))
    except (OSError, ValueError, wire.WireError) as error:
        raise CheckpointError(
            f"{carried.file} has nothing of group {carried.group_id} at byte {carried.offset}: {error}"
        ) from None
    return group
