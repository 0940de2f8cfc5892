"""What a check on a GPU found."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table. ok is None where the machine lacks what the check needs; figure then says what."""

    name: str
    figure: str
    limit: str
    ok: bool | None
