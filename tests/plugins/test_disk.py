"""Weights through files in the run directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from prl.errors import InfrastructureError
from prl.testing import check_weight_transport
from prl_disk import DiskConfig
from prl_disk.files import receive, send
from safetensors.torch import load_file


def weights(version: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(version)
    return {"model.embed_tokens.weight": torch.randn(5, 3, generator=draw), "lm_head.weight": torch.randn(5, 3)}


def test_the_contract_of_transports_holds(tmp_path):
    check_weight_transport(lambda rank: send(DiskConfig(), tmp_path, rank), receive(DiskConfig(), tmp_path))


def test_an_engine_fetches_what_the_trainer_sent(tmp_path):
    sender, receiver = send(DiskConfig(), tmp_path, 0), receive(DiskConfig(), tmp_path)
    sent = weights(3)
    manifest = sender.send(3, sent.items())
    fetched = dict(receiver.fetch(manifest))
    assert manifest.version == 3
    assert manifest.nbytes == 2 * 5 * 3 * 4
    assert fetched.keys() == sent.keys()
    assert all(torch.equal(fetched[name], sent[name]) for name in sent)


def test_a_version_is_a_safetensors_file_of_the_run(tmp_path):
    sent = weights(3)
    send(DiskConfig(), tmp_path, 0).send(3, sent.items())
    loaded = load_file(tmp_path / "weights" / "version-3" / "model-00000.safetensors")
    assert all(torch.equal(loaded[name], sent[name]) for name in sent)


def test_retired_versions_are_removed_and_others_stay(tmp_path):
    sender, receiver = send(DiskConfig(), tmp_path, 0), receive(DiskConfig(), tmp_path)
    old, new = sender.send(1, weights(1).items()), sender.send(2, weights(2).items())
    sender.retire(1)
    sender.retire(1)
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["version-2"]
    with pytest.raises(InfrastructureError, match=r"weights of version 1: .* is gone"):
        list(receiver.fetch(old))
    sender.close()
    assert len(list(receiver.fetch(new))) == 2


def test_a_version_sent_again_replaces_the_one_before(tmp_path):
    sender, receiver = send(DiskConfig(), tmp_path, 0), receive(DiskConfig(), tmp_path)
    sender.send(1, weights(1).items())
    again = sender.send(1, weights(9).items())
    fetched = dict(receiver.fetch(again))
    assert torch.equal(fetched["model.embed_tokens.weight"], weights(9)["model.embed_tokens.weight"])


def test_only_what_lies_in_the_run_is_read(tmp_path):
    elsewhere = send(DiskConfig(), tmp_path / "another run", 0).send(7, weights(7).items())
    with pytest.raises(InfrastructureError, match=r"version 7: .* is not in .*, where weights are read from"):
        list(receive(DiskConfig(), tmp_path / "run").fetch(elsewhere))


def test_a_flipped_byte_is_refused(tmp_path):
    manifest = send(DiskConfig(), tmp_path, 0).send(7, weights(7).items())
    path = Path(manifest.parts[0].location)
    content = bytearray(path.read_bytes())
    content[manifest.tensors[-1].offset] ^= 1
    path.write_bytes(content)
    name = manifest.tensors[-1].name.replace(".", r"\.")
    with pytest.raises(InfrastructureError, match=f"weights of version 7: tensor {name} has checksum"):
        list(receive(DiskConfig(), tmp_path).fetch(manifest))
