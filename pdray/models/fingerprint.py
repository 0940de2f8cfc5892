"""A short digest by which two workers see that they hold the same weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import torch

from pdray.models.decoder import Decoder

SAMPLES_PER_PARAMETER = 16


def fingerprint(decoder: Decoder) -> str:
    """16 hex digits over the model's configuration, dtype and a few evenly spaced elements of every parameter."""
    parameters = decoder.parameters()
    samples = []
    for _, tensor in sorted(parameters.items()):
        flat = tensor.reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // SAMPLES_PER_PARAMETER)].float())
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(decoder.config), sort_keys=True).encode())
    digest.update(str(decoder.dtype).encode())
    digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
