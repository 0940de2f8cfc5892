"""What a prefill worker has where the decode worker's pool cannot be mapped: a channel that says so, and ends."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

from pdray.errors import TransferError
from pdray.transfer.channel import Link, Put, PutResult, Sender
from pdray.transfer.cuda_ipc.messages import CannotMap, Unfit, decode_to_sender, encode


class UnmappedSender(Sender):
    """A Sender that never works. Its check() ends once the receiver knows why, and will choose another kind."""

    kind = "cuda_ipc"

    def __init__(self, link: Link, reason: str, timeout_s: float) -> None:
        self.epoch = link.epoch
        self._link = link
        self._reason = reason
        self._timeout_s = timeout_s
        self._heard = asyncio.Event()

    async def check(self) -> None:
        """See Sender. Always raises."""
        self._link.send(encode(CannotMap(self._reason)))
        text = f"{self._link.peer}'s pool cannot be mapped here: {self._reason}"
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._heard.wait()
        except TimeoutError:
            text += f" (and {self._link.peer} has not acknowledged it)"
        raise TransferError(text)

    def put(self, put: Put) -> Future[PutResult]:
        """See Sender."""
        future: Future[PutResult] = Future()
        future.set_exception(TransferError(f"{self._link.peer}'s pool cannot be mapped here: {self._reason}"))
        return future

    def on_message(self, epoch: int, payload: bytes) -> None:
        """See Sender."""
        if epoch == self.epoch and isinstance(decode_to_sender(payload), Unfit):
            self._heard.set()

    def close(self) -> None:
        """See Sender."""
