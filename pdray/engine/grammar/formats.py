"""Formats of dates and times as patterns that leave nothing out: the library's own let 29 February pass in every year.

RFC 3339, section 5.6; without leap seconds, of which nobody knows when they will be, and with at most nine digits of a
fraction, so that none goes on for ever.
"""

from __future__ import annotations

from typing import Any

from pdray.engine.grammar.keywords import Schema, subschemas

LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"  # 0000 is no year
DAY_OF_MONTH = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
DATE = f"(?:(?:[0-9]{{3}}[1-9]|[0-9]{{2}}[1-9]0|[0-9][1-9]00|[1-9]000)-{DAY_OF_MONTH}|{LEAP_YEAR}-02-29)"
TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:[.][0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
PATTERNS = {"date": f"^{DATE}$", "time": f"^{TIME}$", "date-time": f"^{DATE}T{TIME}$"}


def write_out_formats(schema: Schema) -> None:
    """Replace, in place, what PATTERNS knows. Both keywords speak of strings alone."""
    for _, part in subschemas(schema):
        wanted: Any = part.get("format")
        if isinstance(wanted, str) and wanted in PATTERNS and "pattern" not in part:
            del part["format"]
            part["pattern"] = PATTERNS[wanted]
