"""How many rows of logits are worked on at a time."""

from __future__ import annotations

import torch

# fp32 logits that the element-wise work touches at a time. On a CPU a tile must stay in the core's cache (1 MiB; a
# whole chunk would go through main memory a dozen times); elsewhere it must be large enough to fill the device.
_CPU_TILE_ELEMENTS = 2**18
_DEVICE_TILE_ELEMENTS = 2**24


def tile_rows(vocab: int, device: torch.device) -> int:
    """Rows of `vocab` logits, at least one."""
    elements = _CPU_TILE_ELEMENTS * torch.get_num_threads() if device.type == "cpu" else _DEVICE_TILE_ELEMENTS
    return max(1, elements // vocab)
