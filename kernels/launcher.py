"""Launches of Triton kernels without Triton's binder, for those that are launched one by one in every step.

To launch ``kernel[grid](...)`` Triton looks at the type of every argument and finds the compiled kernel by them, which
takes longer than the kernel runs (150 us on a slow host). Here the caller says what the compiled kernel depends on.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import triton
from torch import Tensor

ALIGNMENT = 16  # bytes; Triton compiles one kernel for pointers that are multiples of it, and one for others


MAX_RECORDED = 512


class Compiled(NamedTuple):
    """What Triton's own launch of a compiled kernel takes."""

    run: Any
    function: int
    metadata: Any


class Recorded(NamedTuple):
    """A launch, to be repeated with the same addresses and numbers."""

    compiled: Compiled
    grid: tuple[int, int, int]
    args: list[Any]

    def launch(self, stream: int) -> None:
        compiled = self.compiled
        compiled.run(*self.grid, stream, compiled.function, compiled.metadata, None, None, None, *self.args)


class Launcher:
    """Compiled kernels by key. For one thread and one device; launches go to its current stream."""

    def __init__(self) -> None:
        self._compiled: dict[Hashable, Compiled] = {}
        self._recorded: dict[Hashable, list[Recorded]] = {}
        self._recording: list[Recorded] = []

    def repeat(self, key: Hashable) -> bool:
        """Launch again what was launched between repeat(key), which returned False, and remember(key).

        Args:
            key: all that these launches depend on, with the addresses of tensors.
        """
        if (recorded := self._recorded.get(key)) is None:
            self._recording = []
            return False
        stream = _current_stream()
        for launch in recorded:
            launch.launch(stream)
        return True

    def remember(self, key: Hashable) -> None:
        """See repeat()."""
        if len(self._recorded) >= MAX_RECORDED:
            self._recorded.clear()
        if self._recording:
            self._recorded[key] = self._recording

    def launch(
        self, key: Hashable, kernel: Any, grid: tuple[int, int, int], args: tuple[Any, ...], **options: Any
    ) -> None:
        """``kernel[grid](*args, **options)``, without Triton's hooks.

        Args:
            key: all that the compiled kernel depends on, but for the kernel itself: dtypes, integers and options.
            args: of every parameter, constants included. Tensors begin at multiples of ALIGNMENT.
        """
        if not isinstance(kernel, triton.JITFunction):  # Triton's interpreter
            kernel[grid](*args, **options)
            return
        compiled = self._compiled.get((kernel.fn, key))
        if compiled is None:
            assert all(arg.data_ptr() % ALIGNMENT == 0 for arg in args if isinstance(arg, Tensor)), "not aligned"
            made = kernel.warmup(*args, grid=grid, **options)
            compiled = self._compiled[kernel.fn, key] = Compiled(made.run, made.function, made.packed_metadata)
        pointers = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
        recorded = Recorded(compiled, grid, pointers)
        recorded.launch(_current_stream())
        self._recording.append(recorded)


def _current_stream() -> int:
    driver = triton.runtime.driver.active
    stream: int = driver.get_current_stream(driver.get_current_device())
    return stream
