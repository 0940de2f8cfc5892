"""Changes a module as soon as it is loaded, in processes that a test cannot reach otherwise."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def patch_when_loaded(name: str, patch: Callable[[ModuleType], None]) -> None:
    """Call patch() with the module of this name once it is loaded, which must be later."""
    sys.meta_path.insert(0, _Patches(name, patch))


class _Patches(importlib.abc.MetaPathFinder):
    """Finds one module as ever, and patches it once it is loaded."""

    def __init__(self, name: str, patch: Callable[[ModuleType], None]) -> None:
        self._name, self._patch = name, patch

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_patch(module: ModuleType) -> None:
            load(module)
            self._patch(module)

        spec.loader.exec_module = load_and_patch  # type: ignore[method-assign]
        return spec
