"""What a router makes of a loss: whether a request goes on, after how long, and what it ends with if not. Pure."""

from __future__ import annotations

from pdray.control.losses import Loss
from pdray.errors import InvalidRequestError, PdrayError, RequestFailedError, WorkerDiedError
from pdray.router.request import Request
from pdray.wire.lease_messages import LeaseClosed
from pdray.wire.prefill_messages import PrefillFailed

REPLAY_DELAY_S = 0.05  # before the second replay; doubles with each
MAX_REPLAY_DELAY_S = 1.0


def loss_of(worker_id: str, message: LeaseClosed | PrefillFailed) -> Loss:
    """What a worker tells of one leg."""
    param = message.param if isinstance(message, PrefillFailed) else None
    if message.verdict == "invalid":
        return Loss(message.reason, worker_id, message.verdict, param)
    reason = f"{worker_id}: {message.reason}"
    return Loss(reason, message.lost_worker_id or reason, message.verdict)


def final_error(request: Request, loss: Loss, max_replays: int) -> PdrayError | None:
    """Why a request that has lost a leg cannot go on; None if it can."""
    if loss.verdict == "invalid":
        return InvalidRequestError(loss.reason, loss.param)
    if loss.verdict == "failed":
        return RequestFailedError(
            f"the engine failed while it computed request {request.request_id} and no other, so it is not tried "
            f"again: {loss.reason}"
        )
    if request.losses.num > max_replays:
        return WorkerDiedError(
            f"request {request.request_id} was lost {request.losses.num} times (max_replays is "
            f"{max_replays}), at last because {loss.reason}"
        )
    return None


def replay_delay_s(num_losses: int) -> float:
    """How long a leg rests that comes after so many losses."""
    return 0.0 if num_losses == 1 else min(MAX_REPLAY_DELAY_S, REPLAY_DELAY_S * 2**num_losses)
