"""Settings of every test. Thread counts are set before torch is imported: two cores must suffice."""

from __future__ import annotations

import os
import secrets

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))  # else Ray writes one to ~/.ray

from hypothesis import HealthCheck, settings

# A loaded machine is no failure: no example has a deadline.
settings.register_profile("pdray", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pdray")
