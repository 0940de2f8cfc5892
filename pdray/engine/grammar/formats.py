"""Formats as patterns that let nothing wrong through, where the library's own do.

Dates and times: RFC 3339, section 5.6, where the library lets 29 February pass in every year; without leap seconds, of
which nobody knows when they will be, and with at most nine digits of a fraction, so that none goes on for ever. Host
names: RFC 1123, section 2.1, of at most 253 characters, without the encoded ones (xn--), which not every text is.
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
LETTER = "[A-Za-z0-9]"  # or digit
NO_TWO_HYPHENS = f"(?:{LETTER}[A-Za-z0-9-]|-{LETTER})"  # third and fourth character of a label
LABEL = (
    f"(?:{LETTER}(?:[A-Za-z0-9-]?{LETTER})?|{LETTER}[A-Za-z0-9-](?:{LETTER}|-){LETTER}"
    f"|{LETTER}[A-Za-z0-9-]{NO_TWO_HYPHENS}[A-Za-z0-9-]{{0,58}}{LETTER})"
)
PATTERNS = {
    "date": f"^{DATE}$",
    "time": f"^{TIME}$",
    "date-time": f"^{DATE}T{TIME}$",
    "hostname": f"^{LABEL}(?:[.]{LABEL})*$",
}
MAX_LENGTHS = {"hostname": 253}


def write_out_formats(schema: Schema) -> None:
    """Replace, in place, what PATTERNS knows. Both keywords speak of strings alone."""
    for _, part in subschemas(schema):
        wanted: Any = part.get("format")
        if isinstance(wanted, str) and wanted in PATTERNS and "pattern" not in part:
            del part["format"]
            part["pattern"] = PATTERNS[wanted]
            longest, given = MAX_LENGTHS.get(wanted), part.get("maxLength")
            if longest is not None and not (isinstance(given, int | float) and given < longest):
                part["maxLength"] = longest
