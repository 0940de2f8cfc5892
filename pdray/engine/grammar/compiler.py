"""Compiles grammars on a thread of its own.

llguidance derives a grammar's states as they are met, so to compile takes milliseconds; masks take microseconds. What
hostile grammars may cost is bounded by their size (pdray.structured_outputs) and by the limits below, which count work
and not time. Requests with the same parameters share what has been derived, within tighter limits: see starts.py.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import llguidance
import msgspec

from pdray.engine.grammar.formats import write_out_formats
from pdray.engine.grammar.keywords import check_keywords, has_only_exclusive_one_of
from pdray.engine.grammar.lark import check_lark
from pdray.engine.grammar.matcher import Grammar, GrammarError
from pdray.engine.grammar.pieces import TokenPieces
from pdray.engine.grammar.starts import Start, Starts
from pdray.errors import InvalidRequestError
from pdray.structured_outputs import FIELD, StructuredOutputsParams

WHITESPACE = r"[ \t\r\n]{1,40}"  # between JSON's tokens: a model that repeats itself gets on after so many
ANY_OBJECT = '{"type": "object"}'
MAX_REMEMBERED = 64
DEAD_END = "NoExtensionBias"  # the library's word for a text that nothing can follow, and that may not end
T = TypeVar("T")
STACK_BYTES = 256 * 1024 * 1024  # reserved, not used: rules that refer to each other are followed by recursion


def _limits(max_lexer_states: int) -> llguidance.LLParserLimits:
    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,  # 20 ms
        step_lexer_fuel=100_000,  # 7 ms
        step_max_items=20_000,  # 1 ms
        max_items_in_row=2_000,
        max_lexer_states=max_lexer_states,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


LIMITS = _limits(50_000)  # 100 MB
SHARED_LIMITS = _limits(5_000)  # 10 MB, which stay after the outputs


class GrammarCompiler:
    """From StructuredOutputsParams to grammars over one vocabulary. Any thread may call.

    Args:
        load: the vocabulary; called once, when it is first needed, on the compiler's thread.
        most_starts: compiled of one grammar, to be shared by its outputs; see Starts.
    """

    def __init__(self, load: Callable[[], TokenPieces], most_starts: int = 1) -> None:
        self._load, self._most_starts = load, most_starts
        self._vocabulary: tuple[TokenPieces, llguidance.LLTokenizer] | None = None
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
            self._vocabulary = tokens, tokens.trie()
        tokens, _ = self._vocabulary
        text = to_grammar(params)

        def compile_one(is_shared: bool) -> Future[llguidance.LLMatcher]:
            return self._submit(self._start, params, text, SHARED_LIMITS if is_shared else LIMITS)

        first = self._start(params, text, SHARED_LIMITS)
        is_expensive = Start(first).is_spent()
        if is_expensive:
            first = self._start(params, text, LIMITS)
            if first.is_error():
                raise refusal(params, first.get_error())
        grammar = Grammar(
            Starts(first, compile_one, 0 if is_expensive else self._most_starts), len(tokens.pieces), tokens.special
        )
        try:
            if not grammar.has_text():
                raise refusal(params, "it allows no text but the empty one")
        except GrammarError as error:
            dead_end = str(error) == DEAD_END
            raise refusal(params, "no text was found that it allows" if dead_end else str(error)) from None
        return grammar

    def _start(
        self, params: StructuredOutputsParams, text: str, limits: llguidance.LLParserLimits
    ) -> llguidance.LLMatcher:
        assert self._vocabulary is not None
        try:
            return llguidance.LLMatcher(self._vocabulary[1], text, log_level=0, limits=limits)
        except ValueError as error:  # the library's own: a number or a depth that it cannot read, a lone surrogate
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
        schema = msgspec.json.decode(params.text or ANY_OBJECT)
        check_keywords(schema)
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


def refusal(params: StructuredOutputsParams, reason: str) -> InvalidRequestError:
    """Why a grammar cannot be compiled, in words that name no library's option."""
    reason = reason.partition("<backtrace>")[0].partition("<non-verbose/>")[0].strip()
    if "coerce_one_of" in reason:
        reason = (
            "oneOf is supported where its branches exclude each other: by their types, by const or enum, or as objects "
            "by one required property with const or enum; use anyOf"
        )
    return InvalidRequestError(f"{params.label} cannot be enforced: {reason}", FIELD)
