"""Obstacles to an application's start: passing errors, permanent errors, and waits. Pure.

A worker that fails to start is tried again, so its error is news and no end. It is the end where trying again cannot
help: a wrong setting, files that are not there, a cluster that is too small. Memory is between the two: a process that
is ending may hold it still, so that only the third failure in a row counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from pdray.errors import ConfigError, HandshakeError, ModelLoadError, OutOfMemoryError, PlacementError

PERMANENT = (ConfigError, ModelLoadError, HandshakeError, PlacementError)
MAX_OUT_OF_MEMORY = 3  # in a row
NO_ROUTER = "no router has reached the workers yet"


class StartState(msgspec.Struct, frozen=True):
    """The progress of an application's start.

    Attributes:
        ready: every worker is ready and every pair connected.
        failed: why it will never be; "" while it may. kind: name of the error's class, of pdray.errors.
        reason: what it waits for, or the last error; "" if nothing is known.
    """

    ready: bool
    failed: str = ""
    kind: str = ""
    reason: str = ""


@dataclass(slots=True)
class _Trouble:
    error: str = ""
    kind: str = ""
    permanent: bool = False
    num_out_of_memory: int = 0
    waits_for: str = ""


@dataclass(slots=True)
class Startup:
    """Troubles by subject: a worker's id, a pair, or the application as a whole."""

    _troubles: dict[str, _Trouble] = field(default_factory=dict, init=False)

    def waits(self, subject: str, reason: str) -> bool:
        """Note that a subject waits for something. Returns whether that is news."""
        trouble = self._troubles.setdefault(subject, _Trouble())
        if trouble.waits_for == reason:
            return False
        trouble.waits_for = reason
        return True

    def failed(self, subject: str, text: str, error: BaseException) -> None:
        """Note a failure that is tried again.

        Args:
            text: for people. error: what was raised; of an actor's exception, the cause.
        """
        trouble = self._troubles.setdefault(subject, _Trouble())
        trouble.num_out_of_memory = trouble.num_out_of_memory + 1 if isinstance(error, OutOfMemoryError) else 0
        trouble.error, trouble.kind, trouble.waits_for = text, type(error).__name__, ""
        trouble.permanent = isinstance(error, PERMANENT) or trouble.num_out_of_memory >= MAX_OUT_OF_MEMORY

    def cleared(self, subject: str) -> None:
        """Note that a subject has no trouble any more."""
        self._troubles.pop(subject, None)

    def state(self, *, ready: bool) -> StartState:
        """Permanent errors before waits, waits before errors that pass."""
        if ready:
            return StartState(True)
        troubles = list(self._troubles.values())
        for trouble in troubles:
            if trouble.permanent and not trouble.waits_for:
                return StartState(False, trouble.error, trouble.kind, trouble.error)
        waits = dict.fromkeys(trouble.waits_for for trouble in troubles if trouble.waits_for)
        errors = dict.fromkeys(trouble.error for trouble in troubles if trouble.error)
        return StartState(False, reason="; ".join([*waits, *errors]))
