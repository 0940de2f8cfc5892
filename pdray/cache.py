"""The folder in which pdray caches files that are expensive to make."""

from __future__ import annotations

import os
from pathlib import Path

from pdray.errors import PdrayError


def cache_folder() -> Path:
    """$PDRAY_CACHE, or pdray in $XDG_CACHE_HOME, or in ~/.cache.

    Raises:
        PdrayError: neither is set, and this user has no home.
    """
    if chosen := os.environ.get("PDRAY_CACHE"):
        return Path(chosen)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "pdray"
    try:
        return Path.home() / ".cache" / "pdray"
    except RuntimeError:
        raise PdrayError("this user has no home folder for the cache; set HOME or PDRAY_CACHE") from None


def make_folder(path: Path) -> None:
    """Make a folder of the cache, if it is not there, and see that it can be written.

    Raises:
        PdrayError: it cannot; the text says what to set.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK | os.X_OK)
        reason = "Permission denied"
    except OSError as error:
        writable, reason = False, error.strerror or str(error)
    if not writable:
        raise PdrayError(f"the cache's folder {path} cannot be written ({reason}); set PDRAY_CACHE to one that can")
