"""Engines that draw under grammars (see grammar_rules.py and schemas.py)."""

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


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


grammar_rules = _load("grammar_rules")
_load("schemas")


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
