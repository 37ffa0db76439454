"""A snapshot is written beside the training that goes on, and the controller is told how that went."""

from __future__ import annotations

import threading
from pathlib import Path

import attrs
from prl.messages import Failed, Saved
from prl.train.checkpoint import Snapshot, TrainerState, file_names
from prl.train.saver import Saver
from torch.optim import SGD

from tests.train.tiny import build_model


@attrs.define
class Controller:
    """The other end of the connections that savers open."""

    heard: list[Saved | Failed] = attrs.field(factory=list)
    open: int = 0

    def connect(self) -> Controller:
        self.open += 1
        return self

    def send(self, message: Saved | Failed) -> None:
        self.heard.append(message)

    def close(self) -> None:
        self.open -= 1


def snapshot(step: int) -> Snapshot:
    model = build_model()
    state = TrainerState(model=model, optimizer=SGD(model.parameters()), rank=3, world_size=4, seed=0)
    return state.snapshot(step=step, version=step)


def test_one_snapshot_after_the_other(tmp_path: Path):
    controller = Controller()
    saver = Saver(controller.connect)
    for step in (1, 2):
        saver.start(snapshot(step), tmp_path / f"step-{step}")
    saver.close()
    assert [(saved.step, saved.rank) for saved in controller.heard] == [(1, 3), (2, 3)]
    for saved in controller.heard:
        assert set(saved.files) == set(file_names(3))
        for name, record in saved.files.items():
            assert (tmp_path / f"step-{saved.step}" / name).stat().st_size == record.nbytes
    assert controller.open == 0


def test_starting_does_not_wait_for_the_disk(tmp_path: Path):
    connected = threading.Event()
    controller = Controller()

    def connect_later() -> Controller:
        assert connected.wait(20)
        return controller.connect()

    saver = Saver(connect_later)
    saver.start(snapshot(1), tmp_path)
    assert controller.heard == []
    connected.set()
    saver.close()
    assert len(controller.heard) == 1


def test_what_cannot_be_written_is_told_as_the_end_of_the_run(tmp_path: Path):
    (tmp_path / "file").touch()
    controller = Controller()
    saver = Saver(controller.connect)
    saver.start(snapshot(1), tmp_path / "file" / "step-1.partial")
    saver.close()
    (failed,) = controller.heard
    assert failed.fatal
    assert "step-1.partial cannot be written ([Errno 20] Not a directory" in failed.error


def test_closing_one_that_never_started_is_fine():
    Saver(Controller().connect).close()
