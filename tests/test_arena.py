# SPDX-License-Identifier: Apache-2.0
"""The arena of a worker against a dictionary of byte strings."""

import random

import pytest
import torch

from dqrelo_kernels.table import aligned

pytest.importorskip("vllm")


@pytest.mark.parametrize("bounce", [256, 1000, 2**26])
def test_extents_keep_their_bytes(bounce, monkeypatch):
    """Extents that come, go and move, in pieces smaller and larger than the gaps."""
    from vllm_dqrelo.worker import arena as module

    monkeypatch.setattr(module, "BOUNCE", bounce)
    draw, arena = random.Random(0), module.Arena(20_000, "cpu")
    address, held, compactions = arena.data.data_ptr(), {}, 0
    for i in range(400):
        if held and draw.random() < 0.45:
            key = draw.choice(list(held))
            arena.free(key)
            del held[key]
        size = draw.randint(1, 6000)
        offset = arena.allocate(str(i), size)
        if offset is None:
            offsets, compactions = arena.compact(), compactions + 1
            held = {key: (offsets[key], data) for key, (_, data) in held.items()}
            assert sum(aligned(len(data)) for _, data in held.values()) == max(
                [o + aligned(len(data)) for o, data in held.values()], default=0
            )
            offset = arena.allocate(str(i), size)
        if offset is not None:
            data = torch.randint(256, (size,), dtype=torch.uint8)
            arena.data[offset : offset + size] = data
            held[str(i)] = (offset, data)
        for start, data in held.values():
            assert torch.equal(arena.data[start : start + len(data)], data)
    assert compactions > 20 and arena.data.data_ptr() == address
