"""The memory of all blocks of one device. It may serve several lanes, and outlive the engine that it was made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from pdray.engine.kv.device_memory import allocate_alone
from pdray.engine.kv.layout import KVLayout


class KVPool(NamedTuple):
    """Attributes:
    tensor: [num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim]; block 0 is a dummy for padding.
    spare: [n] uint8 behind the blocks, of a pool that can be lent to other processes; else None.
    borrowed: it is another process's, which says which blocks may be used.
    """

    layout: KVLayout
    tensor: torch.Tensor
    spare: torch.Tensor | None = None
    borrowed: bool = False

    @classmethod
    def allocate(
        cls,
        layout: KVLayout,
        num_blocks: int,
        device: torch.device,
        *,
        spare_bytes: int = 0,
        memory: Callable[[int], torch.Tensor] | None = None,
    ) -> KVPool:
        """Zeros. On CPU pages are taken when they are used.

        Args:
            spare_bytes: for a pool that is to be lent: blocks and spare are then one allocation, which begins with the
                blocks and holds nothing else.
            memory: gives zeros, [n] uint8, that others can map; default: this process's own.
        """
        num_bytes = num_blocks * layout.block_bytes
        if memory is not None:
            pages = memory(num_bytes + spare_bytes)
        elif device.type == "cpu":
            pages = torch.from_numpy(np.zeros(num_bytes + spare_bytes, dtype=np.uint8))
        elif spare_bytes:
            pages = allocate_alone(num_bytes + spare_bytes, device).zero_()
        else:
            pages = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        tensor = pages[:num_bytes].view(layout.dtype).view(layout.shape(num_blocks))
        return cls(layout, tensor, pages[num_bytes:] if spare_bytes else None)

    @classmethod
    def borrow(cls, layout: KVLayout, num_blocks: int, pages: torch.Tensor) -> KVPool:
        """Another process's pool, mapped here: [at least its blocks' bytes] uint8 from its beginning."""
        tensor = pages[: num_blocks * layout.block_bytes].view(layout.dtype).view(layout.shape(num_blocks))
        return cls(layout, tensor, borrowed=True)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> KVPool:
        """A tensor of a pool's shape as a pool."""
        num_layers, _, _, block_size, num_kv_heads, head_dim = tensor.shape
        return cls(KVLayout(num_layers, block_size, num_kv_heads, head_dim, tensor.dtype), tensor)

    @property
    def num_blocks(self) -> int:
        """The dummy block included."""
        return self.tensor.shape[1]

    @property
    def device(self) -> torch.device:
        return self.tensor.device
