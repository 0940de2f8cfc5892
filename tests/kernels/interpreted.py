"""Runs a file of checks in Triton's interpreter: ``python tests/kernels/interpreted.py attention_cases.py``.

The interpreter looks through all of triton.language each time that one jitted function calls another, to replace what
is built in. It was all replaced when the kernel began: more than half of the checks' time.
"""

from __future__ import annotations

import functools
import gc
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).parent


def replace_once_a_kernel(interpreter: ModuleType) -> None:
    """Let it look for what is built in once for each kernel that is run and each module that its functions know."""
    patch = interpreter._patch_lang
    replaced: set[str] = set()  # names of modules, in the kernel that runs

    @functools.cache
    def modules_of(function: Callable[..., Any]) -> frozenset[str]:
        seen = (value for value in function.__globals__.values() if isinstance(value, ModuleType))
        return frozenset(value.__name__ for value in seen if value in (interpreter.tl, interpreter.tl.core))

    def patch_what_is_new(function: Callable[..., Any]) -> Any:
        scope = interpreter._LangPatchScope()
        if not modules_of(function) <= replaced:
            scope = patch(function)
            replaced.update(modules_of(function))
        return scope

    def restore_all(scope: Any) -> None:
        restore(scope)
        replaced.clear()

    restore = interpreter._LangPatchScope.restore
    interpreter._LangPatchScope.restore = restore_all
    interpreter._patch_lang = patch_what_is_new


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import triton.runtime.interpreter

    replace_once_a_kernel(triton.runtime.interpreter)
    gc.disable()  # an operation makes dozens of objects, none of which is in a cycle
    sys.argv = sys.argv[1:]
    runpy.run_path(str(FOLDER / sys.argv[0]), run_name="__main__")
