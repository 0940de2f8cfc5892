"""How a prefill worker gets a nccl channel from a decode worker's offer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from pdray.cluster.messages import AnyMessage, ChannelOffer, OpenChannel
from pdray.errors import HandshakeError, TransferError
from pdray.transfer.communicator import SENDER_RANK, Transport, open_communicator
from pdray.transfer.nccl_sender import NcclSendChannel
from pdray.transfer.staging import Staging


async def open_nccl_channel(
    transport: Transport,
    staging: Staging,
    offer: ChannelOffer,
    *,
    peer: str,
    epoch: int,
    timeout_s: float,
    send: Callable[[AnyMessage], None],
    on_failed: Callable[[str], None],
) -> NcclSendChannel:
    """Enter the communicator together with the decode worker. Nothing has gone through it yet: see check().

    Args:
        send, on_failed: as of NcclSendChannel, but called on this event loop's thread.

    Raises:
        TransferError: the communicator did not come about. HandshakeError: the two differ in their staging.
    """
    loop = asyncio.get_running_loop()

    def soon(call: Callable[[Any], None], argument: Any) -> None:
        if not loop.is_closed():  # else it belonged to a worker that has ended
            loop.call_soon_threadsafe(call, argument)

    send(OpenChannel(epoch))
    communicator = await open_communicator(partial(transport.connect, offer.unique_id, SENDER_RANK))
    try:
        return NcclSendChannel(
            staging,
            communicator,
            transport.new_stream,
            name=peer,
            epoch=epoch,
            piece_bytes=offer.piece_bytes,
            timeout_s=timeout_s,
            send=partial(soon, send),
            on_failed=partial(soon, on_failed),
        )
    except HandshakeError:
        await asyncio.to_thread(communicator.close)
        raise


async def check(channel: NcclSendChannel) -> None:
    """See a first, small transfer through; the peer's messages must reach the channel by now.

    Raises:
        TransferError: it did not arrive, or not as it was sent.
    """
    result = await asyncio.wrap_future(channel.probe())
    if not result.accepted:
        raise TransferError(f"a probe of the channel of epoch {channel.epoch} did not arrive as it was sent")
