"""Logging in the processes of an application: adds messages that Ray leaves out, and drops Serve's repeated ones."""

from __future__ import annotations

import logging
import re

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
POLLED = re.compile(r"(GET|HEAD) \S*/(health|ping|metrics)/? ")


def log_to_stderr() -> None:
    """Send pdray's messages from INFO on to stderr, which Ray keeps in a file of the process. Idempotent.

    Without it Python's default holds: warnings only, and neither their time nor who says them.
    """
    logger = logging.getLogger("pdray")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(FORMAT))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def leave_out_polls() -> None:
    """Keep load balancers' and probes' requests out of this Serve replica's access log. Idempotent."""
    logging.getLogger("ray.serve").addFilter(_is_no_poll)


def _is_no_poll(record: logging.LogRecord) -> bool:
    return not (getattr(record, "serve_access_log", False) and POLLED.match(record.getMessage()))
