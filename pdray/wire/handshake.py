"""Handshake: before anything else both ends of a connection prove that they know the cluster's secret.

The acceptor sends a Challenge, the initiator a Hello, the acceptor a Welcome or a Reject. A proof is an HMAC-SHA256
over the other's nonce and the names of both, so that it is good for one connection to one server; the secret itself
never travels. What follows on the connection is neither encrypted nor signed.

Nothing here has a deadline of its own: callers set one.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets

import msgspec

from pdray.errors import HandshakeError
from pdray.wire.frames import encode_frame, read_frame
from pdray.wire.peers import PeerName

MAX_HANDSHAKE_BYTES = 4096


class Challenge(msgspec.Struct, frozen=True, array_like=True, tag=True):
    peer: PeerName
    nonce: bytes


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Attributes:
    resume: go on with a session that the acceptor has, rather than start one.
    received: number of messages of the session that the initiator has.
    """

    peer: PeerName
    nonce: bytes
    session_id: str
    resume: bool
    received: int
    proof: bytes


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=True):
    received: int
    proof: bytes


class Reject(msgspec.Struct, frozen=True, array_like=True, tag=True):
    reason: str


Greeting = Challenge | Hello | Welcome | Reject
_decode = msgspec.msgpack.Decoder(Greeting).decode


def _prove(secret: bytes, *parts: bytes | str) -> bytes:
    mac = hmac.new(secret, digestmod="sha256")
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        mac.update(len(data).to_bytes(4, "big") + data)
    return mac.digest()


def _prove_hello(secret: bytes, challenge: Challenge, nonce: bytes, me: PeerName, session_id: str) -> bytes:
    """For the challenger alone: whoever passes its challenge on under another name gets a proof it cannot use."""
    return _prove(secret, "hello", challenge.nonce, nonce, *challenge.peer, *me, session_id)


def _prove_welcome(secret: bytes, hello_nonce: bytes, me: PeerName) -> bytes:
    return _prove(secret, "welcome", hello_nonce, *me)


async def _read(reader: asyncio.StreamReader, sender: str) -> Greeting:
    body = await read_frame(reader, MAX_HANDSHAKE_BYTES)
    try:
        return _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HandshakeError(f"{sender} does not speak pdray's protocol: {error}") from error


async def initiate(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    me: PeerName,
    expect: PeerName,
    secret: bytes,
    session_id: str,
    resume: bool,
    received: int,
    address: str,
) -> int:
    """The connecting end's part; returns how many messages of the session the peer has received.

    Args:
        received: see Hello. address: of the peer, for errors.

    Raises:
        HandshakeError: the peer is not ``expect``, does not know the secret, or refuses the session.
        OSError: the connection was lost.
    """
    try:
        challenge = await _read(reader, address)
        if not isinstance(challenge, Challenge) or challenge.peer != expect:
            raise HandshakeError(f"{address} is not {expect}: it says {challenge}")
        nonce = secrets.token_bytes(16)
        proof = _prove_hello(secret, challenge, nonce, me, session_id)
        writer.write(encode_frame(Hello(me, nonce, session_id, resume, received, proof)))
        answer = await _read(reader, address)
    except EOFError as error:
        raise ConnectionError(f"{address} closed the connection in the handshake") from error
    if isinstance(answer, Reject):
        raise HandshakeError(f"{expect.id} refused the session: {answer.reason}")
    if not isinstance(answer, Welcome) or not hmac.compare_digest(answer.proof, _prove_welcome(secret, nonce, expect)):
        raise HandshakeError(f"{expect.id} at {address} does not know the cluster's secret")
    return answer.received


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, me: PeerName, secret: bytes) -> Hello:
    """The accepting end's part: challenge the peer. It waits for welcome() or reject() then.

    Raises:
        HandshakeError: the peer does not know the secret. OSError, EOFError: the connection was lost.
    """
    challenge = Challenge(me, secrets.token_bytes(16))
    writer.write(encode_frame(challenge))
    hello = await _read(reader, "the peer")
    if not isinstance(hello, Hello) or not hmac.compare_digest(
        hello.proof, _prove_hello(secret, challenge, hello.nonce, hello.peer, hello.session_id)
    ):
        raise HandshakeError("wrong secret")
    return hello


def welcome(writer: asyncio.StreamWriter, hello: Hello, *, me: PeerName, secret: bytes, received: int) -> None:
    """Answer a Hello: the session is open, and this end has received so many of its messages."""
    writer.write(encode_frame(Welcome(received, _prove_welcome(secret, hello.nonce, me))))


def reject(writer: asyncio.StreamWriter, reason: str) -> None:
    writer.write(encode_frame(Reject(reason)))
