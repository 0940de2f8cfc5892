"""The OpenAI-compatible API as a Ray Serve application."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdray.config import Config

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["build"]


def build(args: Config) -> Application:
    """See pdray.serve.app.build."""
    from pdray.serve.app import build

    return build(args)
