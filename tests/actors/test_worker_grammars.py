"""Structured outputs through a pair of workers."""

from __future__ import annotations

import re

import pytest
from worker_pairs import PROMPT, Pair

from pdray.engine.grammar.compiler import GrammarCompiler
from pdray.engine.grammar.pieces import TokenPieces
from pdray.sampling_params import SamplingParams
from pdray.structured_outputs import StructuredOutputsParams
from pdray.wire.lease_messages import CloseLease, LeaseClosed
from pdray.wire.prefill_messages import PrefillFailed


def give_vocabulary(pair: Pair) -> None:
    """Token i is the byte i + 32; the last one, the end of sequence, is no text."""
    tokens = TokenPieces([bytes([32 + i]) for i in range(95)] + [b""], frozenset({95}))
    for worker in (pair.prefill, pair.decode):
        worker.engine.grammars = GrammarCompiler(lambda: tokens)


@pytest.mark.parametrize("n", [1, 2])
async def test_a_grammar_holds_from_the_first_token_on(pair: Pair, n: int) -> None:
    """The prefill worker draws under it, and the decode worker goes on from there, to its end."""
    give_vocabulary(pair)
    wanted = StructuredOutputsParams(regex="[a-f]{3}[0-9]{4}")
    params = SamplingParams(n=n, temperature=1.0, seed=3, max_tokens=30, structured_outputs=wanted)
    texts = {}
    for name, prefill_worker_id in (("apart", "prefill-0"), ("local", None)):
        key = pair.lease(name, PROMPT, params, prefill_worker_id=prefill_worker_id)
        if prefill_worker_id is not None:
            await pair.start_prefill(key, PROMPT, params)
        await pair.router.wait(lambda key=key: all(len(pair.router.tokens(key, i)) == 7 for i in range(n)))
        texts[name] = [bytes(32 + token for token in pair.router.tokens(key, i)).decode() for i in range(n)]
    assert all(re.fullmatch("[a-f]{3}[0-9]{4}", text) for text in texts["apart"])
    assert texts["apart"] == texts["local"]
    await pair.quiet()


async def test_a_grammar_that_a_worker_cannot_compile_ends_the_leg_alone(pair: Pair) -> None:
    """Routers check before; here the prefill worker says so, and the lease is closed."""
    give_vocabulary(pair)
    wanted = StructuredOutputsParams(regex="(?=a)b")
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=30, structured_outputs=wanted)
    key = pair.lease("r", PROMPT, params)
    await pair.start_prefill(key, PROMPT, params)
    failed = await pair.router.first(PrefillFailed, key)
    assert (failed.verdict, failed.param) == ("invalid", "structured_outputs") and "look-around" in failed.reason
    pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    local = pair.lease("local", PROMPT, params, prefill_worker_id=None)
    closed = await pair.router.first(LeaseClosed, local)
    assert closed.verdict == "invalid" and "look-around" in closed.reason
    await pair.quiet()
