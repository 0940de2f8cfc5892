"""What follows when workers that are connected do not serve."""

from __future__ import annotations

from pdray.control.pair_health import FORGOTTEN_S, PairHealth, Reconnect, Replace

PAIR = ("prefill-0", "decode-0")


def test_first_the_channel_then_the_workers_one_after_the_other() -> None:
    health = PairHealth()
    assert health.failed(0.0, PAIR, 1, [PAIR]) == Reconnect(*PAIR)
    assert health.failed(1.0, PAIR, 1, [PAIR]) is None  # another router says the same
    assert {health.failed(2.0, PAIR, 2, [PAIR]), health.failed(3.0, PAIR, 3, [PAIR])} == {Replace(w) for w in PAIR}
    assert health.failed(3.0 + FORGOTTEN_S + 1, PAIR, 4, [PAIR]) == Reconnect(*PAIR)


def test_the_one_that_works_with_nobody_is_replaced() -> None:
    others = [("prefill-0", "decode-1"), ("prefill-1", "decode-0")]
    for well, culprit in ((others[:1], "decode-0"), (others[1:], "prefill-0")):
        for number in (2, 3):
            health = PairHealth()
            for epoch in range(1, number):
                health.failed(0.0, PAIR, epoch, [PAIR, *well])
            assert health.failed(1.0, PAIR, number, [PAIR, *well]) == Replace(culprit)


def test_a_partner_that_failed_too_is_no_proof() -> None:
    health = PairHealth()
    second = ("prefill-0", "decode-1")
    pairs = [PAIR, second, ("prefill-1", "decode-0"), ("prefill-1", "decode-1")]
    assert health.failed(0.0, PAIR, 1, pairs) == Reconnect(*PAIR)
    assert health.failed(0.0, second, 1, pairs) == Reconnect(*second)
    assert health.failed(1.0, PAIR, 2, pairs) == Replace("prefill-0")
