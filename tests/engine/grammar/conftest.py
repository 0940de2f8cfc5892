"""Engines that draw under grammars (see grammar_rules.py)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdray.engine.grammar.compiler import GrammarCompiler
from pdray.engine.grammar.pieces import TokenPieces
from pdray.testing.patience import PATIENCE_S

_spec = importlib.util.spec_from_file_location("grammar_rules", Path(__file__).with_name("grammar_rules.py"))
assert _spec is not None and _spec.loader is not None
grammar_rules = sys.modules["grammar_rules"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(grammar_rules)


@pytest.fixture(scope="module")
def grammars() -> GrammarCompiler:
    return GrammarCompiler(lambda: TokenPieces(grammar_rules.PIECES, grammar_rules.SPECIAL))


@pytest.fixture
def make(llama: Any, grammars: GrammarCompiler) -> Callable[..., Any]:
    """Engines that share one compiler, in which all of RULES is compiled."""
    for params in grammar_rules.RULES.values():
        if params.structured_outputs is not None:
            grammars.check(params.structured_outputs).result(PATIENCE_S)

    def make(**settings: Any) -> Any:
        engine = llama.engine(**settings)
        engine.grammars = grammars
        return engine

    return make
