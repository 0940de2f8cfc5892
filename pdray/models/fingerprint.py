"""A short digest by which two workers see that they hold the same weights, whatever ranks they are divided among."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

import torch

from pdray.kernels.collective.group import RankGroup
from pdray.models.decoder import Decoder
from pdray.models.shards import Cut, Span

SAMPLES_PER_PARAMETER = 16
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: multiples are spread evenly, in rows and in columns


def fingerprint(decoder: Decoder) -> str:
    """16 hex digits over the model's configuration, dtype and a few elements of every parameter.

    All ranks of a group call it, and get what one alone would.
    """
    cuts = decoder.cuts()
    parts = [_samples(tensor, cuts.get(name)) for name, tensor in sorted(decoder.parameters().items())]
    samples = _of_all_ranks(torch.cat(parts, dim=1), decoder.group)
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(decoder.config), sort_keys=True).encode())
    digest.update(str(decoder.dtype).encode())
    digest.update(samples.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _samples(tensor: torch.Tensor, cut: Cut | None) -> torch.Tensor:
    """[2, SAMPLES_PER_PARAMETER] float32: elements of the whole tensor, and 1 for those that this rank holds."""
    cut = cut or Cut(0, Span.all_of(tensor.shape[0]))
    shape = cut.whole_shape(tensor.shape)
    size = math.prod(shape)
    places = [(i * GOLDEN % 2**64) * size >> 64 for i in range(SAMPLES_PER_PARAMETER)]
    indices = list(torch.unravel_index(torch.tensor(places), shape))
    along = indices[cut.dim]
    is_held = (along >= cut.span.start) & (along < cut.span.stop)
    indices[cut.dim] = along - cut.span.start
    held = is_held.to(tensor.device)
    samples = torch.zeros(2, SAMPLES_PER_PARAMETER, device=tensor.device)
    samples[0, held] = tensor[tuple(index[is_held].to(tensor.device) for index in indices)].float()
    samples[1] = held
    return samples


def _of_all_ranks(samples: torch.Tensor, group: RankGroup | None) -> torch.Tensor:
    """Elements, each from the first rank that holds it."""
    values = samples[0]
    if group is None:
        return values
    for others, held in group.gather(samples) or []:
        missing = samples[1] == 0
        values = torch.where(missing, others, values)
        samples[1] += held * missing
    values = values.contiguous()
    group.broadcast(values)
    return values
