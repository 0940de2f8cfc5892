"""How long a test waits for what must come."""

from __future__ import annotations

# A wait that is longer is a hang. On a machine that does other work, what takes a second may take a minute.
PATIENCE_S = 300.0
