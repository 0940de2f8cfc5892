"""The base of every part: weights under a checkpoint's names, in a tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from pdray.kernels.collective.group import RankGroup
from pdray.models.arena import Arena
from pdray.models.model_config import ModelConfig
from pdray.models.shards import Cut, Shard


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a part's weights lie, and as what. On the device "meta" a part has shapes and no values.

    Attributes:
        arena: that they lie in, on that device; None: each lies where torch puts it.
        group: the ranks that share the model, each with a shard of every part; None: this process has all of it.
    """

    dtype: torch.dtype
    device: torch.device
    arena: Arena | None = None
    group: RankGroup | None = None

    def shard(self, config: ModelConfig) -> Shard:
        """What this rank holds. Raises ConfigError; see Shard."""
        return Shard.of(config) if self.group is None else Shard.of(config, self.group.rank, self.group.size)

    def empty(self, *shape: int) -> torch.Tensor:
        """A weight without a value; in an arena, whatever lies there."""
        if self.arena is not None:
            return self.arena.take(shape, self.dtype)
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class Part:
    """Holds weights of its own, and other parts.

    A subclass registers the parts that it is made of with ``add``, and overrides ``own_weights``, ``own_cuts`` and
    ``pack_own`` if it has weights itself.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[str, Part]] = []

    def add(self, name: str, part: P) -> P:
        """Make ``part`` a part of this one. Returns it.

        Args:
            name: what its weights' names begin with, without the dot; "" for none.
        """
        self._parts.append((f"{name}." if name else "", part))
        return part

    def own_weights(self) -> dict[str, torch.Tensor]:
        """Weights that are not a subpart's, by the end of their names."""
        return {}

    def own_cuts(self) -> dict[str, Cut]:
        """Which parts of a checkpoint's tensors own weights are, by the same names; of those that are no whole ones."""
        return {}

    def pack_own(self) -> None:
        """Bring own weights into the layout that the device's kernels like best."""

    def parameters(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Every weight under its Hugging Face name; weights of fused tensors are views to be written into.

        After pack_weights() what was packed comes as copies, for reading only.
        """
        named = {prefix + name: weight for name, weight in self.own_weights().items()}
        for name, part in self._parts:
            named |= part.parameters(prefix + name)
        return named

    def cuts(self, prefix: str = "") -> dict[str, Cut]:
        """What parameters() are of a checkpoint's tensors, where they are not the whole of them."""
        named = {prefix + name: cut for name, cut in self.own_cuts().items()}
        for name, part in self._parts:
            named |= part.cuts(prefix + name)
        return named

    def pack_weights(self) -> None:
        """Pack every weight, one at a time; call it once, after loading."""
        self.pack_own()
        for _, part in self._parts:
            part.pack_weights()


P = TypeVar("P", bound=Part)
