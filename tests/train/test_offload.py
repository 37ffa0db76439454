"""The optimizer's state comes for the step and goes again; training does not notice."""

from __future__ import annotations

import pytest
import torch
from prl.train.offload import at_hand, moved

from tests.train.tiny import build_model, build_stepper, pack_batch, random_samples


def trained(device: str, **settings: object) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
    model = build_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    stepper = build_stepper(model, optimizer, device=torch.device(device), **settings)
    for step in range(3):
        batch = pack_batch(random_samples(6, seed=step))
        stepper.step(batch, batch.ranks[0], 0.01)
    return model.state_dict(), optimizer


def test_training_is_the_same():
    kept, _ = trained("cpu")
    away, _ = trained("cpu", optimizer_offload=True)
    assert all(torch.equal(kept[name], away[name]) for name in kept)


def test_state_is_moved_for_the_step_and_back():
    """The meta device stands for another: what is moved there is known by its device."""
    parameter = torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = {"mean": torch.ones(3), "step": torch.tensor(2.0), "count": 5}
    state = optimizer.state[parameter]
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"), at_hand(optimizer):
        assert (state["mean"].device.type, state["step"].device.type, state["count"]) == ("meta", "cpu", 5)
    assert moved(torch.ones(2), torch.device("cpu")).device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_between_steps_nothing_of_it_is_on_the_device():
    kept, _ = trained("cuda")
    away, optimizer = trained("cuda", optimizer_offload=True)
    assert all(torch.equal(kept[name], away[name]) for name in kept)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert {value.device.type for value in moments} == {"cpu"}
