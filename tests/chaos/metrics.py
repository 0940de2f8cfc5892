"""What the routers have counted, read from Ray's metrics port."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections import Counter

import ray

SETTLED_S = 5.0
EXPORT_TIMEOUT_S = 40.0
SAMPLE = re.compile(r"ray_pdray_requests_total\{(.*)\} (\S+)")
OUTCOME = re.compile(r'outcome="([^"]*)"')


def counted_now() -> Counter[str]:
    """Requests by outcome, of all routers, as exported last."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    counts: Counter[str] = Counter()
    with urllib.request.urlopen(url, timeout=5) as response:
        for line in response.read().decode().splitlines():
            if (sample := SAMPLE.fullmatch(line)) and (outcome := OUTCOME.search(sample[1])):
                counts[outcome[1]] += int(float(sample[2]))
    return counts


async def counted() -> Counter[str]:
    """Requests by outcome, once the export has told everything: when it has not changed for a while."""
    counts: Counter[str] = Counter()
    changed_at = began = time.monotonic()
    while time.monotonic() - changed_at < SETTLED_S and time.monotonic() - began < EXPORT_TIMEOUT_S:
        try:
            latest = await asyncio.to_thread(counted_now)
        except OSError:
            latest = counts
        if latest != counts:
            counts, changed_at = latest, time.monotonic()
        await asyncio.sleep(0.5)
    return counts
