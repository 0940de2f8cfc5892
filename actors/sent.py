"""What a prefill worker has sent to one decode worker."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Sent:
    """Completed puts since the worker began, over every channel that the two have had.

    Attributes:
        seconds: from put() until the receiver had it, summed over puts, which overlap.
    """

    num_puts: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    def add(self, num_bytes: int, seconds: float) -> None:
        """A put has completed."""
        self.num_puts += 1
        self.num_bytes += num_bytes
        self.seconds += seconds
