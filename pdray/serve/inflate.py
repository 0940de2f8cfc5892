"""Compressed request bodies, inflated piece by piece, so that a small one cannot become a huge one."""

from __future__ import annotations

import zlib

from pdray.serve.errors import ApiError

CODINGS = ("gzip", "x-gzip", "deflate")
MAX_MEMBERS = 64  # a gzip file may be several, one after another


class Inflater:
    """Inflates a body of one coding.

    Args:
        max_bytes: of what comes out.
    """

    def __init__(self, coding: str, max_bytes: int) -> None:
        self._coding = coding
        self._max_bytes = max_bytes
        self._stream: zlib._Decompress | None = None
        self._num_members = 0
        self._held = b""  # too few bytes to know the format by
        self.inflated = bytearray()

    def feed(self, data: bytes) -> None:
        """Inflate the next bytes.

        Raises:
            ApiError: 413 once more than max_bytes came out; 400 if they are not of this coding.
        """
        while data:
            if self._stream is None:
                data = self._held + data
                if len(data) < 2:
                    self._held = data
                    return
                self._held = b""
                self._stream = self._begin(data)
            try:
                self.inflated += self._stream.decompress(data, self._max_bytes - len(self.inflated) + 1)
            except zlib.error as error:
                raise self._broken(str(error)) from None
            if len(self.inflated) > self._max_bytes:
                raise ApiError(413, f"the body inflates to more than {self._max_bytes} bytes (max_request_bytes)")
            data = self._stream.unused_data
            if self._stream.eof:
                self._stream = None

    def finish(self) -> bytearray:
        """Everything that came out.

        Raises:
            ApiError: 400, the body was cut short.
        """
        if self._stream is not None or self._held or not self._num_members:
            raise self._broken("it is cut short")
        return self.inflated

    def _begin(self, data: bytes) -> zlib._Decompress:
        self._num_members += 1
        is_gzip = self._coding != "deflate"
        if self._num_members > (MAX_MEMBERS if is_gzip else 1):
            raise self._broken(f"it has more than {MAX_MEMBERS} members" if is_gzip else "there is more behind its end")
        if is_gzip:
            return zlib.decompressobj(16 + zlib.MAX_WBITS)
        has_header = data[0] & 15 == 8 and (data[0] * 256 + data[1]) % 31 == 0
        return zlib.decompressobj(zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)  # some clients leave it out

    def _broken(self, why: str) -> ApiError:
        return ApiError(400, f"the body cannot be inflated as {self._coding} (Content-Encoding): {why}")


def coding_of(header: str) -> str | None:
    """The coding that a Content-Encoding header names; None for none.

    Raises:
        ApiError: 415, another one, or more than one.
    """
    codings = [each for part in header.split(",") if (each := part.strip().lower()) not in ("", "identity")]
    if not codings:
        return None
    if codings[1:] or codings[0] not in CODINGS:
        raise ApiError(
            415,
            f"Content-Encoding {', '.join(codings)!r} is not supported; send the body as it is, or as gzip or deflate",
            headers={"Accept-Encoding": "gzip, deflate"},
        )
    return codings[0]
