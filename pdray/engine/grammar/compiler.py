"""Compiles grammars on a thread of its own.

llguidance derives a grammar's states as they are met, so to compile takes milliseconds; masks take microseconds. What
hostile grammars may cost is bounded by their size (pdray.structured_outputs) and by the limits below, which count work
and not time. Requests with the same parameters share what has been derived, within tighter limits: see starts.py.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import llguidance
import msgspec

from pdray.engine.grammar.formats import write_out_formats
from pdray.engine.grammar.free_strings import find_runs
from pdray.engine.grammar.keywords import check_keywords, has_only_exclusive_one_of
from pdray.engine.grammar.lark import check_lark
from pdray.engine.grammar.matcher import Grammar, GrammarError, num_words
from pdray.engine.grammar.multiples import check_multiples
from pdray.engine.grammar.pieces import TokenPieces
from pdray.engine.grammar.runs import Runs
from pdray.engine.grammar.spelling import Spelling
from pdray.engine.grammar.starts import Start, Starts
from pdray.errors import InvalidRequestError
from pdray.structured_outputs import FIELD, StructuredOutputsParams

WHITESPACE = r"[ \t\r\n]{1,40}"  # between JSON's tokens: a model that repeats itself gets on after so many
ANY_OBJECT = '{"type": "object"}'
MAX_REMEMBERED = 64
DEAD_END = "NoExtensionBias"  # the library's word for a text that nothing can follow, and that may not end
T = TypeVar("T")
STACK_BYTES = 256 * 1024 * 1024  # reserved, not used: rules that refer to each other are followed by recursion


MAX_ITEMS = 2_000
# Rules of a request's own may read a text in many ways, and every step costs the square of a row: "a: a a | X" half a
# second at 2,000 items, 20 ms at 500. Schemas cannot: JSON's brackets and commas say how a text is read.
MAX_ITEMS_OF_RULES = 500
MAX_STATES, MAX_SHARED_STATES = 50_000, 5_000  # 100 MB and 10 MB, which stay after the outputs


def _limits(params: StructuredOutputsParams, is_shared: bool) -> llguidance.LLParserLimits:
    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,  # 20 ms
        step_lexer_fuel=100_000,  # 7 ms
        step_max_items=20_000,  # 1 ms where texts can be read in one way
        max_items_in_row=MAX_ITEMS_OF_RULES if params.kind == "grammar" else MAX_ITEMS,
        max_lexer_states=MAX_SHARED_STATES if is_shared else MAX_STATES,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


class _Vocabulary(NamedTuple):
    """What is made of the tokens once."""

    tokens: TokenPieces
    trie: llguidance.LLTokenizer
    spelling: Spelling
    runs: Runs


class GrammarCompiler:
    """From StructuredOutputsParams to grammars over one vocabulary. Any thread may call.

    Args:
        load: the vocabulary; called once, when it is first needed, on the compiler's thread.
        most_starts: compiled of one grammar, to be shared by its outputs; see Starts.
    """

    def __init__(self, load: Callable[[], TokenPieces], most_starts: int = 1) -> None:
        self._load, self._most_starts = load, most_starts
        self._vocabulary: _Vocabulary | None = None
        self._lane = ThreadPoolExecutor(1, "pdray-grammar")
        self._lock = threading.Lock()
        self._known: OrderedDict[StructuredOutputsParams, Future[Grammar]] = OrderedDict()

    def compile(self, params: StructuredOutputsParams) -> Future[Grammar]:
        """The grammar for a request, or InvalidRequestError with the reason why there is none. Returns at once."""
        with self._lock:
            future = self._future(params)
            if future.done() and future.exception() is None:
                future.result().starts.expect()
            return future

    def check(self, params: StructuredOutputsParams) -> Future[Grammar]:
        """What compile() will give, for no request."""
        with self._lock:
            return self._future(params)

    def _future(self, params: StructuredOutputsParams) -> Future[Grammar]:
        if params not in self._known:
            self._known[params] = self._submit(self._compile, params)
        self._known.move_to_end(params)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return self._known[params]

    def warm(self) -> None:
        """Load the vocabulary now, beside the caller."""
        self.check(StructuredOutputsParams(json_object=True))

    def _submit(self, work: Callable[..., T], *args: object) -> Future[T]:
        size = threading.stack_size(STACK_BYTES)  # of the lane's thread, which the first submit() starts
        try:
            return self._lane.submit(work, *args)
        finally:
            threading.stack_size(size)

    def _compile(self, params: StructuredOutputsParams) -> Grammar:
        if self._vocabulary is None:
            tokens = self._load()
            size = num_words(len(tokens.pieces) + 1)
            self._vocabulary = _Vocabulary(
                tokens, tokens.trie(), Spelling(tokens.pieces, size), Runs(tokens.pieces, tokens.special, size)
            )
        tokens, _, spelling, runs = self._vocabulary
        try:
            text = to_grammar(params)
        except InvalidRequestError:
            raise
        except ValueError as error:  # the library's own: a number or a depth that it cannot read, a lone surrogate
            raise refusal(params, str(error)) from None

        def compile_one(is_shared: bool) -> Future[llguidance.LLMatcher]:
            return self._submit(self._start, params, text, is_shared)

        first = self._start(params, text, True)
        is_expensive = Start(first).is_spent()
        if is_expensive:
            first = self._start(params, text, False)
            if first.is_error():
                raise refusal(params, first.get_error())
        starts = Starts(first, compile_one, 0 if is_expensive else self._most_starts)
        is_json = params.kind in ("json", "json_object")
        grammar = Grammar(
            starts, len(tokens.pieces), tokens.special, spelling if is_json else None, find_runs(runs, params)
        )
        try:
            if not grammar.has_text():
                raise refusal(params, "it allows no text but the empty one")
        except GrammarError as error:
            dead_end = str(error) == DEAD_END
            raise refusal(params, "no text was found that it allows" if dead_end else str(error)) from None
        return grammar

    def _start(self, params: StructuredOutputsParams, text: str, is_shared: bool) -> llguidance.LLMatcher:
        assert self._vocabulary is not None
        try:
            return llguidance.LLMatcher(self._vocabulary.trie, text, log_level=0, limits=_limits(params, is_shared))
        except ValueError as error:
            raise refusal(params, str(error)) from None


def to_grammar(params: StructuredOutputsParams) -> str:
    """llguidance's own notation of it.

    Raises:
        InvalidRequestError: it cannot be enforced, with the reason.
    """
    match params.kind:
        case "json" | "json_object":
            return _of_schema(params)
        case "regex":
            return str(llguidance.LLMatcher.grammar_from_regex(params.text))
        case "choice":
            choices = " | ".join(json.dumps(each) for each in params.choice or ())
            # one lexeme: as alternatives of a rule, each would be an item of the parser's first row
            return str(llguidance.LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}"))
        case "grammar":
            try:
                grammar = llguidance.grammar_from("grammar", params.text)
            except ValueError as error:
                raise refusal(params, str(error)) from None
            check_lark(grammar)
            return grammar


def _of_schema(params: StructuredOutputsParams) -> str:
    try:
        schema = msgspec.json.decode(ANY_OBJECT if params.json is None else params.text)
        check_keywords(schema)
        check_multiples(schema)
        write_out_formats(schema)
        if isinstance(schema, bool):
            schema = {} if schema else {"enum": []}
        text = msgspec.json.encode(schema).decode()
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise refusal(params, f"it is no JSON: {error}") from None
    options: dict[str, Any] = {
        "lenient": False,
        "coerce_one_of": has_only_exclusive_one_of(schema),
        "whitespace_flexible": not params.disable_any_whitespace,
        "item_separator": ",",
        "key_separator": ":",
    }
    if not params.disable_any_whitespace:
        options["whitespace_pattern"] = params.whitespace_pattern or WHITESPACE
    return str(llguidance.LLMatcher.grammar_from_json_schema(text, None, options))  # type: ignore[arg-type]


# What the library says, as a regex, and what a client is told.
REASONS = {
    "coerce_one_of": (
        "oneOf is supported where its branches exclude each other: by their types, by const or enum, or as objects by "
        "one required property with const or enum; use anyOf"
    ),
    "Resource '(.*)' is not present": (
        r"its $ref or $schema leads out of it, to '\1'; put what a $ref stands for under $defs"
    ),
    "for float range": (
        "its numbers (minimum, maximum, exclusiveMinimum, exclusiveMaximum) must be between -2^63 and 2^63, with at "
        "most 15 digits"
    ),
    "patternProperty regexes (.*) are not disjoint": (
        r"one name may match several of its patternProperties, \1; make their patterns exclude each other"
    ),
    "(Unsatisfiable schema: (?:anyOf is empty|schema is false))": (
        r"no value satisfies it, or an enum, allOf, anyOf or oneOf of it (\1)"
    ),
    "^(regex parse error)": r"a pattern is none of Rust's regex crate: \1",
}


def refusal(params: StructuredOutputsParams, reason: str) -> InvalidRequestError:
    """Why a grammar cannot be compiled, in words that name no library's option."""
    reason = reason.partition("<backtrace>")[0].partition("<non-verbose/>")[0].strip()
    for said, told in REASONS.items() if params.kind in ("json", "json_object") else ():
        if (found := re.search(said, reason)) is not None:
            reason = found.expand(told) + (reason[found.end() :] if said.startswith("^") else "")
            break
    return InvalidRequestError(f"{params.label} cannot be enforced: {reason}", FIELD)
