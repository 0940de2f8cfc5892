"""Errors that pdray raises. Each text names the value, the limit and the setting to change."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


class PdrayError(Exception):
    """Base of every error that pdray raises on purpose."""


class ConfigError(PdrayError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class InvalidRequestError(PdrayError, ValueError):
    """A request that can never be served as it stands (HTTP 400).

    Attributes:
        param: name of the offending request field, if one can be named.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """A prompt, or a prompt and its output, that the model's context cannot hold.

    Its text begins like OpenAI's, by which clients know it: see pdray.router.validation.over_context.
    """


class ModelLoadError(PdrayError):
    """The model's files are missing, of an unknown kind, or inconsistent."""


class OutOfMemoryError(PdrayError):
    """The device cannot hold what the configuration asks for."""


class PlacementError(PdrayError):
    """Ray's cluster, as it is, will never have what the workers ask for."""


class StartTimeoutError(PdrayError, TimeoutError):
    """The workers were not ready within start_timeout_s; the text holds what kept them from it."""


class QueueFullError(PdrayError):
    """The router's bounded queue is full, or the request waited too long (HTTP 429).

    Attributes:
        retry_after_s: seconds after which a place is expected, from the measured drain rate.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoWorkerError(PdrayError):
    """No connected worker can serve the request now (HTTP 503)."""


class RequestTimeoutError(PdrayError):
    """The request was not finished within request_timeout_s (HTTP 504)."""


class WorkerDiedError(PdrayError):
    """A worker died or stopped answering while it held the request."""


class RequestFailedError(PdrayError):
    """The engine failed while it computed this request and no other: another try would fail again (HTTP 500)."""


class StepFailedError(PdrayError):
    """A step of a worker's engine failed, and the engine cannot go on.

    Attributes:
        keys: the requests that the step computed, or may have.
    """

    def __init__(self, message: str, keys: Sequence[Hashable] = ()) -> None:
        super().__init__(message)
        self.keys = keys


class EngineHungError(PdrayError):
    """A step of a worker's engine took longer than step_timeout_s."""


class RankDiedError(PdrayError):
    """One of the processes that share a worker's model has ended, and so the worker cannot go on.

    Attributes:
        was_killed: by a signal, as a worker of one process might be: nothing that it computed is to blame.
    """

    def __init__(self, message: str, *, was_killed: bool = False) -> None:
        super().__init__(message)
        self.was_killed = was_killed


class TransferError(PdrayError):
    """A channel failed, was closed, or passed its deadline."""


class HandshakeError(PdrayError):
    """Two peers disagree on weights, dtype, block size, KV layout, protocol or secret."""


def describe_error(error: BaseException) -> str:
    """The error's class and the first line of its text."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
