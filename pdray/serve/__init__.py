"""The OpenAI-compatible API as a Ray Serve application."""

# No `from __future__ import annotations` here: Serve reads build()'s annotation to make a Config of a YAML's args.

from typing import TYPE_CHECKING

from pdray.config import Config

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["MARK", "build"]

MARK = "pdray_serve"  # key in the user_config of pdray's deployments: by it they are known, and who has deployed them


def build(args: Config) -> "Application":
    """See pdray.serve.app.build. `import_path: pdray.serve:build`, with Config's fields as args."""
    from pdray.serve.app import build

    return build(args)
