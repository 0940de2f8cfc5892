"""Every message that travels between processes, by who says it to whom."""

from __future__ import annotations

from pdray.wire.lease_messages import (
    CloseLease,
    CreditUpdate,
    EndCompletion,
    LeaseClosed,
    LeaseDenied,
    LeaseGranted,
    LeaseRequest,
    RenewLeases,
    Tokens,
)
from pdray.wire.prefill_messages import (
    CancelPrefill,
    FirstTokens,
    LeaseConfirmed,
    Ping,
    Pong,
    PrefillFailed,
    PrefillRequest,
)
from pdray.wire.put_messages import AbortPut, BeginPut, BeginPutReply, ChannelMessage, PutAborted, PutDone
from pdray.wire.worker_news import PrefixUpdate, StepFailed

RouterToWorker = (
    LeaseRequest | RenewLeases | CloseLease | EndCompletion | PrefillRequest | LeaseConfirmed | CancelPrefill | Ping
)
WorkerToRouter = (
    LeaseGranted
    | LeaseDenied
    | LeaseClosed
    | Tokens
    | CreditUpdate
    | FirstTokens
    | PrefillFailed
    | Pong
    | PrefixUpdate
    | StepFailed
)
PrefillToDecode = BeginPut | PutDone | PutAborted | ChannelMessage
DecodeToPrefill = BeginPutReply | AbortPut | ChannelMessage
AnyMessage = RouterToWorker | WorkerToRouter | PrefillToDecode | DecodeToPrefill
