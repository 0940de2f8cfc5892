"""Sessions deliver every message exactly once and in order, or say that they ended, whatever the network does."""

from __future__ import annotations

import asyncio
import importlib.util
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pdray.cluster import session as session_module
from pdray.cluster.session import PeerName
from pdray.errors import HandshakeError

_spec = importlib.util.spec_from_file_location("session_faults", Path(__file__).with_name("session_faults.py"))
assert _spec is not None and _spec.loader is not None
faults = importlib.util.module_from_spec(_spec)
sys.modules["session_faults"] = faults
_spec.loader.exec_module(faults)
