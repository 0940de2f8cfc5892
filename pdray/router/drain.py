"""The end of a router's service, in order: requests that run go on until a deadline, and are then told.

Pure: time is passed in. Single-threaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Drain:
    """Attributes:
    refuses: why new requests are refused; None while they are taken.
    """

    refuses: str | None = None
    _ends_at: float | None = field(default=None, init=False)
    _reason: str = field(default="", init=False)
    _is_over: bool = field(default=False, init=False)

    def begin(self, now: float, left_s: float, reason: str, *, refuse: bool) -> float | None:
        """End what still runs after `left_s`. A deadline that is set already stays if it is the earlier one.

        Args:
            refuse: take no new requests from now on.

        Returns:
            The deadline, if it is a new one: due() must be asked then.
        """
        if refuse:
            self.refuses = reason
        if self._ends_at is not None and self._ends_at <= now + left_s:
            return None
        self._ends_at, self._reason = now + left_s, reason
        return self._ends_at

    def due(self, now: float) -> str | None:
        """What every request is to end with, once the deadline is over; told once."""
        if self._ends_at is None or self._is_over or now < self._ends_at:
            return None
        self._is_over = True
        return f"the answer was cut short: {self._reason}"

    def cancel(self) -> None:
        """Go on as before."""
        self.refuses = self._ends_at = None
        self._is_over = False
