"""The side that opens a session: dials, and dials again after a loss."""

from __future__ import annotations

import asyncio
import secrets

from pdray.errors import HandshakeError
from pdray.wire import handshake
from pdray.wire.peers import PeerName
from pdray.wire.session import Session, SessionHandler

RECONNECT_INTERVAL_S = 0.05


async def connect(
    host: str,
    port: int,
    *,
    me: PeerName,
    expect: PeerName,
    secret: bytes,
    handler: SessionHandler,
    timeout_s: float,
) -> Session:
    """Open a session to a SessionServer; it reconnects by itself for up to timeout_s after a loss.

    on_open is called before this returns.

    Raises:
        HandshakeError: the peer is not ``expect`` or does not know the secret. OSError: unreachable.
    """
    session = Session(expect, secrets.token_hex(8), handler, timeout_s)
    reader = await _dial(session, host, port, me, secret, resume=False)
    try:
        handler.on_open(session)
    except BaseException:
        session.finish("its owner failed to open it", tell=True)
        raise
    session.spawn(_stay_connected(session, reader, host, port, me, secret))
    return session


async def _stay_connected(
    session: Session, reader: asyncio.StreamReader, host: str, port: int, me: PeerName, secret: bytes
) -> None:
    while True:
        reason = await session.receive(reader)
        try:
            async with asyncio.timeout(session.timeout_s):
                while not session.closed:
                    try:
                        reader = await _dial(session, host, port, me, secret, resume=True)
                        break
                    except ConnectionRefusedError as error:
                        session.end(f"nobody listens any more ({error})", tell=False)
                    except OSError:
                        await asyncio.sleep(RECONNECT_INTERVAL_S)
        except TimeoutError:
            session.end(f"connection lost ({reason}) and not restored within {session.timeout_s:g} s", tell=False)
        except HandshakeError as error:
            session.end(str(error), tell=False)
        if session.closed:
            return


async def _dial(
    session: Session, host: str, port: int, me: PeerName, secret: bytes, *, resume: bool
) -> asyncio.StreamReader:
    # a resume has time for several attempts: one of them may be swallowed
    async with asyncio.timeout(session.timeout_s / 4 if resume else session.timeout_s):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            peer_received = await handshake.initiate(
                reader,
                writer,
                me=me,
                expect=session.peer,
                secret=secret,
                session_id=session.session_id,
                resume=resume,
                received=session.received,
                address=f"{host}:{port}",
            )
        except BaseException:
            writer.close()
            raise
    session.attach(writer, peer_received)
    return reader
