"""How large multipleOf may be: to follow it takes a state for each remainder, which no limit of the compiler counts."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

from pdray.engine.grammar.keywords import Schema, subschemas
from pdray.errors import InvalidRequestError
from pdray.structured_outputs import FIELD

MAX_REMAINDERS = 100_000  # a second of the compiler's time


def check_multiples(schema: Schema) -> None:
    """Refuse a schema that is too expensive to compile.

    Raises:
        InvalidRequestError: names the number and the limit.
    """
    parts = []
    for path, part in subschemas(schema):
        value = part.get("multipleOf")
        if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
            raise InvalidRequestError(f"the JSON Schema's multipleOf (at {path}) is {value}; it must be above 0", FIELD)
        parts.append(part)
    numbers = {digits: part["multipleOf"] for part in parts if (digits := _digits(part.get("multipleOf")))}
    limit = f"; without zeros and point it may be at most {MAX_REMAINDERS}"
    if numbers and (worst := max(numbers)) > MAX_REMAINDERS:
        raise InvalidRequestError(f"the JSON Schema's multipleOf {numbers[worst]!r} is too expensive{limit}", FIELD)
    are_combined = any("allOf" in part or ("$ref" in part and len(part) > 1) for part in parts)
    if are_combined and (multiple := math.lcm(*numbers)) > MAX_REMAINDERS:
        raise InvalidRequestError(
            f"the JSON Schema combines several multipleOf, whose least common multiple {multiple} is too "
            f"expensive{limit}",
            FIELD,
        )


def _digits(value: Any) -> int:
    """Of a positive number, from its first digit to its last that are not zero; 0 of anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        return 0
    return int("".join(map(str, Decimal(repr(value)).normalize().as_tuple().digits)))
