"""Settings of every test. Thread counts are set before torch is imported: two cores must suffice."""

from __future__ import annotations

import os
import secrets
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault(
    "RAY_ENABLE_AUTO_CONNECT", "0"
)  # else a call without a cluster starts one, which ends this process later
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))  # else Ray writes one to ~/.ray

from hypothesis import HealthCheck, settings

from pdray.kernels.cpu_rows import steady_rows

steady_rows()

SESSION: pytest.StashKey[pytest.Session] = pytest.StashKey()

# A loaded machine is no failure: no example has a deadline.
settings.register_profile("pdray", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pdray")


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[SESSION] = session


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ray's native library now and then crashes while the interpreter ends, after every test has passed.

    Seen as a segmentation fault in _raylet.so, on a thread of its own. What pytest has to say has been said by now.
    """
    session = config.stash.get(SESSION, None)
    if session is not None and "ray" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(session.exitstatus))
