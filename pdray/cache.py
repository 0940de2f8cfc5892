"""Where pdray keeps what it need not make twice."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$PDRAY_CACHE, or pdray in $XDG_CACHE_HOME, or in ~/.cache."""
    if chosen := os.environ.get("PDRAY_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdray"
