"""New weights beside the ones being served: fetched and assembled in a thread, swapped in between two steps.

A model's tensors exist twice. `prepare` fills the set that is not served; `swap` exchanges the two sets, which costs
nothing per byte, so generation hardly pauses. A failed `prepare` leaves the served set alone. Called by `server.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

import torch
from prl.errors import InfrastructureError
from prl.providers import NumberFormat, WeightMap, WeightReceiver
from prl.types import Manifest
from torch import Tensor, nn


class Weights:
    """The served and the staged weights of one model."""

    def __init__(
        self,
        model: nn.Module,
        weight_map: WeightMap,
        receiver: WeightReceiver,
        *,
        number_format: NumberFormat | None = None,
    ) -> None:
        self._map = weight_map
        self._format = number_format
        self._receiver = receiver
        self._served = dict(_tensors(model))
        self._staged = {name: torch.empty_like(tensor.data) for name, tensor in self._served.items()}
        self._staged_version: int | None = None
        self._staging = threading.Lock()

    @property
    def staged_version(self) -> int | None:
        """The version that `swap` would serve, None when there is none."""
        return self._staged_version

    @torch.no_grad()
    def prepare(self, manifest: Manifest) -> None:
        """Fetch, verify and assemble a version; blocking, runs beside generation, one version after the other.

        InfrastructureError says what is wrong with the version; nothing is staged then.
        """
        with self._staging:
            self._staged_version = None
            self._assemble(manifest)
            self._staged_version = manifest.version

    def _assemble(self, manifest: Manifest) -> None:
        received: Mapping[str, Tensor] = dict(self._receiver.fetch(manifest))
        if self._format is not None:
            received = self._format.restore(received)
        for name, staged in self._staged.items():
            try:
                tensor = self._map.from_hf(received, name)
            except KeyError as missing:
                raise InfrastructureError(
                    f"version {manifest.version} at {manifest.where} lacks {missing}, which the model's {name} needs"
                ) from None
            except Exception as error:  # a weight map may fail in any way on tensors that are not its model's
                raise InfrastructureError(
                    f"version {manifest.version} at {manifest.where} does not fit the model's {name}: {error}"
                ) from error
            if tensor.shape != staged.shape:
                raise InfrastructureError(
                    f"version {manifest.version} at {manifest.where} has {name} of shape {tuple(tensor.shape)}, the "
                    f"model needs {tuple(staged.shape)}"
                )
            staged.copy_(tensor)

    def swap(self) -> int:
        """Serve the staged version; returns it. Runs in the model's thread between two steps, so it never waits."""
        if not self._staging.acquire(blocking=False):
            raise InfrastructureError("a version is still being prepared")
        try:
            version, self._staged_version = self._staged_version, None
            if version is None:
                raise InfrastructureError("no version is prepared")
            for name, served in self._served.items():
                served.data, self._staged[name] = self._staged[name], served.data
        finally:
            self._staging.release()
        return version


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Everything that is published: parameters (tied ones once) and the buffers that checkpoints hold."""
    yield from model.named_parameters()
    stored = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)
