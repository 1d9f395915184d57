# SPDX-License-Identifier: Apache-2.0
"""Copies between host memory, which is pageable, and the device."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.platforms import current_platform

PIECE = 2**26  # bytes of each of the two pinned buffers


class Staging:
    """Two pinned buffers, through which bytes pass piece by piece on a stream.

    A GPU copies fast, and beside other work, from pinned memory only. Torch rounds
    pinned memory up to a power of two and keeps it, so that deltas are in pageable
    memory, and the buffers are allocated once. A buffer is filled while the other is
    copied. On a CPU there are no buffers, and a copy is torch's.

    Args:
        device: of the model.
        streams: has the streams and events of ``device``: torch.cuda, by default, on a
            GPU.
    """

    def __init__(self, device: torch.device, streams: Any = None) -> None:
        self._device = device
        self._streams = torch.cuda if device.type == "cuda" else streams
        if self._streams is None:
            return
        self._side = self._streams.Stream(device)
        self._pinned = current_platform.is_pin_memory_available()
        self._buffers = deque(
            (
                torch.empty(PIECE, dtype=torch.uint8, pin_memory=self._pinned),
                self._streams.Event(),
            )
            for _ in range(2)
        )

    def write(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy ``source`` to the device; the caller may free or change it at once.

        Later work of the current stream waits for the copy by an event. The host waits
        for a buffer only: from the third piece on, until the first piece is copied.

        Args:
            target: on the device, contiguous. Mutated.
            source: on the host, contiguous, of the same bytes.
        """
        if self._streams is None:
            target.copy_(source)
            return
        with self._side_stream():
            for there, here in _pieces(target, source):
                buffer, event = self._free_buffer()
                piece = buffer[: len(here)]
                piece.copy_(here)
                there.copy_(piece, non_blocking=True)
                event.record()

    def read(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy ``source`` from the device. The host waits until it is copied.

        Args:
            target: on the host, contiguous. Mutated.
            source: on the device, contiguous, of the same bytes.
        """
        if self._streams is None:
            target.copy_(source)
            return
        arriving: deque[tuple[torch.Tensor, torch.Tensor, Any]] = deque()
        with self._side_stream():
            for here, there in _pieces(target, source):
                if len(arriving) == len(self._buffers):
                    _arrive(*arriving.popleft())
                buffer, event = self._free_buffer()
                piece = buffer[: len(here)]
                piece.copy_(there, non_blocking=True)
                event.record()
                arriving.append((here, piece, event))
            for one in arriving:
                _arrive(*one)

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A small tensor of the host on the device; on a CPU itself.

        Torch keeps the pinned memory of the tensor until it is copied; nobody waits.
        """
        if self._streams is None:
            return tensor
        if self._pinned:
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    @contextmanager
    def _side_stream(self) -> Iterator[None]:
        """Work within it comes after, and before, other work of the current stream."""
        current = self._streams.current_stream()
        self._side.wait_stream(current)  # a step may still use the bytes
        with self._streams.stream(self._side):
            yield
        current.wait_stream(self._side)

    def _free_buffer(self) -> tuple[torch.Tensor, Any]:
        """The buffer whose turn it is, and the event to record after its copy."""
        self._buffers.rotate()
        buffer, event = self._buffers[0]
        event.synchronize()
        return buffer, event


def _pieces(
    one: torch.Tensor, other: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The bytes of two tensors, as many at a time as a buffer holds."""
    if one.numel():
        parts = (t.view(-1).view(torch.uint8).split(PIECE) for t in (one, other))
        yield from zip(*parts, strict=True)


def _arrive(target: torch.Tensor, piece: torch.Tensor, event: Any) -> None:
    event.synchronize()
    target.copy_(piece)
