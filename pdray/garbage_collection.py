"""Python's garbage collector in a process whose steps take a millisecond."""

from __future__ import annotations

import gc

# Container objects that outlive their allocation before the youngest are examined; Python's 700 means a few hundred
# examinations a second. What a request leaves behind holds no cycle, as a rule.
THRESHOLDS = (50_000, 20, 50)


def quiet_garbage_collection() -> None:
    """Call it when all that lasts is there: it is never examined again, and what comes is examined rarely.

    Before, a batch of 256 met 5 to 18 ms of collection every twentieth step.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
