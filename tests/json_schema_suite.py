"""Holds the grammars of JSON Schemas against a public suite, and against what comes out of them at random.

    python tests/json_schema_suite.py FOLDER [--walks 200] [--seed 0] [--list]

FOLDER: tests/draft2020-12 of github.com/json-schema-org/JSON-Schema-Test-Suite. Of each schema there, one of these is
true: it is refused with its keyword's name; or every instance that the suite calls valid can come out, and none that it
calls invalid. EXPLAINED says where neither is, and why. An instance can come out if it does in some order of properties
(a schema's own come in its order) and in one of two spellings of its numbers and strings. The walks draw tokens evenly
from the masks, of as many of the schemas that are held to as asked for; each text must be valid by the jsonschema
package.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jsonschema import FormatChecker
from jsonschema.validators import validator_for

from pdray.engine.grammar.compiler import GrammarCompiler
from pdray.engine.grammar.grammar import Grammar
from pdray.engine.grammar.matcher import GrammarError, Words
from pdray.engine.grammar.pieces import TokenPieces
from pdray.errors import InvalidRequestError
from pdray.structured_outputs import StructuredOutputsParams

NUM_PIECES = 256
WORDS = ('{"', '":', '",', "true", "null", "12", "-1.5e", '"}', "}]", "foo", "bar", "é", "\\u00", "ab")
PIECES = [bytes([i]) for i in range(NUM_PIECES)] + [word.encode() for word in WORDS]
COMPILER = GrammarCompiler(lambda: TokenPieces(PIECES, frozenset()))
MAX_ORDERS, MAX_WALK, MAX_VALUES = 5000, 400, 6
END_SOON_AFTER = 60  # tokens of a walk, from which on it takes what closes a value, where it may
# By the beginning of a place.
EXPLAINED = {
    "format.json": "formats are enforced",
    "optional/ecmascript-regex.json: ECMA 262 \\": "what \\s is, is Unicode's: U+FEFF is no space",
    "optional/format/date-time.json": "no leap seconds, small letters, or more than nine digits of a fraction",
    "optional/format/time.json": "no leap seconds or small letters",
    "optional/format/email.json": "no quoted local parts, no IPv6 addresses",
    "optional/format/ipv6.json": "no IPv4 within",
    "optional/format/hostname.json": "no encoded labels (xn--)",
}


class Case(NamedTuple):
    """A schema of the suite with its instances."""

    place: str
    schema: Any
    tests: list[dict[str, Any]]


def cases(folder: Path) -> Iterator[Case]:
    for path in sorted(folder.rglob("*.json")):
        for case in json.loads(path.read_text()):
            name = f"{path.relative_to(folder)}: {case['description']}"
            yield Case(name, case["schema"], case["tests"])


def compiled(schema: Any) -> Grammar:
    return COMPILER.check(StructuredOutputsParams(json=schema, disable_any_whitespace=True)).result()


def can_come_out(grammar: Grammar, value: Any) -> bool:
    return any(allows(grammar, text) for text in itertools.islice(texts(value), MAX_ORDERS))


def allows(grammar: Grammar, text: str) -> bool:
    """Whether the whole text may come out."""
    try:
        matcher = grammar.matcher(text.encode(errors="surrogatepass"))
        words = grammar.empty_mask()
        matcher.fill(words)
    except GrammarError:
        return False
    end = grammar.vocab_size
    return bool(words[end // 32] >> end % 32 & 1)


def texts(value: Any) -> Iterator[str]:
    """The value's JSON in every order of properties, and two spellings."""
    for ordered in orders(value):
        for whole, ascii_only in itertools.product((False, True), repeat=2):
            spelled = numbers(ordered) if whole else ordered
            yield json.dumps(spelled, separators=(",", ":"), ensure_ascii=ascii_only)


def orders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for names in itertools.permutations(value) if len(value) <= MAX_VALUES else [tuple(value)]:
            for values in itertools.product(*(list(orders(value[name])) for name in names)):
                yield dict(zip(names, values, strict=True))
    elif isinstance(value, list) and len(value) <= MAX_VALUES:
        yield from (list(each) for each in itertools.product(*(list(orders(each)) for each in value)))
    else:
        yield value


def numbers(value: Any) -> Any:
    """1 for 1.0."""
    if isinstance(value, dict):
        return {name: numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [numbers(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def names_a_keyword(schema: Any, reason: str) -> bool:
    """Whether a refusal says which of the schema's keywords it is about."""
    keywords = {*re.findall(r'"([^"]+)":', json.dumps(schema)), "$dynamicAnchor"}  # that of a schema of schemas
    return any(re.search(rf"(?<![\w$]){re.escape(keyword)}(?!\w)", reason) for keyword in keywords)


def walk(grammar: Grammar, chance: random.Random) -> str | None:
    """A text drawn evenly from the masks; None if it has no end soon."""
    matcher, words, text = grammar.matcher(), grammar.empty_mask(), b""
    for step in range(MAX_WALK):
        matcher.fill(words)
        ids = allowed(words, grammar.vocab_size)
        if grammar.vocab_size in ids and (len(ids) == 1 or chance.random() < 0.3 or step > END_SOON_AFTER):
            return text.decode()
        ids = [each for each in ids if each != grammar.vocab_size]
        closing = [each for each in ids if PIECES[each] in (b'"', b"}", b"]", b"0", b"\x80")]
        token_id = chance.choice(closing if closing and step > END_SOON_AFTER else ids)
        matcher.take(token_id)
        text += PIECES[token_id]
        if matcher.ended:
            return text.decode()
    return None


def allowed(words: Words, vocab_size: int) -> list[int]:
    return [i for i in range(vocab_size + 1) if words[i // 32] >> i % 32 & 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--walks", type=int, default=200, help="schemas to draw from")
    parser.add_argument("--texts", type=int, default=5, help="drawn from each of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="every schema, and why it was refused")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    faults: list[str] = []
    held: list[tuple[Case, Grammar]] = []
    for case in cases(args.folder):
        counts["schemas"] += 1
        try:
            grammar = compiled(case.schema)
        except InvalidRequestError as error:
            is_named = names_a_keyword(case.schema, str(error))
            counts["refused by name" if is_named else "refused without a name"] += 1
            if args.list:
                print("refused" if is_named else "REFUSED", case.place, "|", error)
            continue
        wrong = [test for test in case.tests if can_come_out(grammar, test["data"]) is not test["valid"]]
        counts["held to"] += not wrong
        counts["instances of those"] += len(case.tests)
        for test in wrong:
            kind = "valid, and cannot come out" if test["valid"] else "INVALID, AND CAN COME OUT"
            why = next((why for place, why in EXPLAINED.items() if case.place.startswith(place)), None)
            counts[f"{kind}: {why}" if why else kind] += 1
            if why and args.list:
                print(f"{kind} ({why}): {case.place}: {test['description']}")
            if why:
                continue
            faults.append(f"{kind}: {case.place}: {test['description']}: {json.dumps(test['data'])[:200]}")
        if not wrong:
            held.append((case, grammar))
    print(*faults, sep="\n")
    chance = random.Random(args.seed)
    for case, grammar in chance.sample(held, min(args.walks, len(held))):
        counts["schemas walked"] += 1
        validator = validator_for(case.schema)(case.schema, format_checker=FormatChecker())
        for _ in range(args.texts):
            text = walk(grammar, chance)
            counts["texts drawn" if text is not None else "texts without an end"] += 1
            try:
                error = None if text is None else next(validator.iter_errors(json.loads(text)), None)
            except re.error:
                counts["texts that jsonschema cannot check, for a pattern that is not Python's"] += 1
                continue
            if text is not None and error is not None and case.place.startswith("optional/ecmascript-regex.json"):
                counts["texts of classes (\\w, \\s) that Python reads in another way"] += 1
            elif text is not None and error is not None:
                faults.append(f"DRAWN AND INVALID: {case.place}: {text[:200]}: {error.message[:200]}")
                print(faults[-1])
    print(*(f"{number:6} {name}" for name, number in counts.items()), sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
