"""Waiting, with a deadline, for a put or for anything else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from pdray.testing.patience import PATIENCE_S
from pdray.transfer.channel import PutResult


async def result(future: Future[PutResult]) -> PutResult:
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.wrap_future(future)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)
