"""The memory of all blocks of one device. It may serve several lanes, and outlive the engine that it was made for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from pdray.engine.kv.layout import KVLayout


class KVPool(NamedTuple):
    """Attributes:
    tensor: [num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim]; block 0 is a dummy for padding.
    """

    layout: KVLayout
    tensor: torch.Tensor

    @classmethod
    def allocate(cls, layout: KVLayout, num_blocks: int, device: torch.device) -> KVPool:
        """Zeros. On CPU pages are taken when they are used."""
        shape = layout.shape(num_blocks)
        if device.type != "cpu":
            return cls(layout, torch.zeros(shape, dtype=layout.dtype, device=device))
        pages = np.zeros(num_blocks * layout.block_bytes, dtype=np.uint8)
        return cls(layout, torch.from_numpy(pages).view(layout.dtype).view(shape))

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

    def holds_layers(self, layers: range) -> bool:
        """Whether these are some of its layers."""
        return 0 <= layers.start < layers.stop <= self.layout.num_layers
