"""The time that a test waits for an event that must come."""

from __future__ import annotations

# A wait that is longer is a hang. On a machine that does other work, what takes a second may take a minute.
PATIENCE_S = 300.0
