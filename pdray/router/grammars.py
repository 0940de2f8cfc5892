"""Structured outputs are compiled before a request may wait for a place: what cannot be enforced is told at once."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING

from pdray.engine.grammar.compiler import GrammarCompiler
from pdray.engine.grammar.pieces import TokenPieces
from pdray.errors import InvalidRequestError, QueueFullError
from pdray.sampling_params import SamplingParams
from pdray.structured_outputs import FIELD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPILE_TIMEOUT_S = 5.0  # large schemas take a second


@functools.lru_cache(maxsize=4)
def compiler_of(tokenizer: PreTrainedTokenizerBase) -> GrammarCompiler:
    """The tokenizer's compiler; made once, for it remembers what it has compiled."""
    return GrammarCompiler(lambda: TokenPieces.of(tokenizer))


async def check_grammar(params: SamplingParams, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Compile what the output must look like, beside the event loop. The workers do so again, within the same limits.

    Raises:
        InvalidRequestError: it cannot be enforced, or takes too long. QueueFullError: others take so long.
    """
    wanted = params.structured_outputs
    if wanted is None or tokenizer is None:
        return
    future = compiler_of(tokenizer).check(wanted)
    waiting = asyncio.wrap_future(future)
    await asyncio.wait([waiting], timeout=COMPILE_TIMEOUT_S)
    if waiting.done():
        waiting.result()
        return
    waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
    if not future.running():
        raise QueueFullError("other requests' grammars are being compiled; try again", COMPILE_TIMEOUT_S)
    raise InvalidRequestError(
        f"{wanted.label} takes longer than {COMPILE_TIMEOUT_S:g} s to compile; make it smaller or simpler", FIELD
    )
