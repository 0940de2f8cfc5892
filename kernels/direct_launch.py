"""Kernels of steps that are launched one by one, without Triton's binder.

A long step is hundreds of launches, and ``kernel[grid](...)`` takes several times as long as the driver's call inside
it: Triton binds the arguments by name, describes each of them anew, and looks the kernel up by these descriptions as
text. Where a step's host part is longer than the device's, that is what the step takes. Here a kernel is found by the
little of its arguments that Triton would compile another one for.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pdray.kernels.dependent_launch import dependent_launch
from pdray.kernels.launcher import ALIGNMENT, Compiled, current_stream

INT32_MAX = (1 << 31) - 1


class DirectKernel:
    """A Triton kernel whose last parameter is DEPENDENT, behind its other constants; see begin(). From any thread.

    Hooks that others set for Triton's launches hear of none of these.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[Hashable, Compiled] = {}

    def launch(
        self,
        grid: tuple[int, int, int],
        args: tuple[Any, ...],
        constants: tuple[int | None, ...],
        num_warps: int,
        num_stages: int | None = None,
    ) -> None:
        """Launch on the current stream of the current device, where the first argument is.

        Args:
            args: of every parameter that is no constant, in order, a tensor or a descriptor of one first.
            constants: of the parameters behind those, but for DEPENDENT.
            num_stages: default: Triton's.
        """
        first = args[0]
        device = first.device if isinstance(first, Tensor) else first.base.device
        dependent = dependent_launch(device)
        if isinstance(self.kernel, triton.JITFunction):
            values, kinds = describe(args)
            key = (device, num_warps, num_stages, constants, kinds)
            compiled = self._compiled.get(key)
            if compiled is None:
                options = _options(num_warps, num_stages, dependent)
                made = self.kernel.warmup(*args, *constants, grid=grid, **options)
                compiled = self._compiled[key] = Compiled(made.run, made.function, made.packed_metadata)
            compiled.run(
                *grid, current_stream(), compiled.function, compiled.metadata, None, None, None,
                *values, *constants, dependent["DEPENDENT"],
            )  # fmt: skip
        else:  # Triton's interpreter
            self.kernel[grid](*args, *constants, **_options(num_warps, num_stages, dependent))


def _options(num_warps: int, num_stages: int | None, dependent: dict[str, bool]) -> dict[str, Any]:
    stages = {} if num_stages is None else {"num_stages": num_stages}
    return {"num_warps": num_warps, **stages, **dependent}


def describe(args: tuple[Any, ...]) -> tuple[list[Any], tuple[Hashable, ...]]:
    """What a launch is given, with addresses for tensors; and what the compiled kernel depends on: types, alignment,
    which numbers are 1 or multiples of 16, and how wide they are."""
    values: list[Any] = []
    kinds: list[Hashable] = []
    for arg in args:
        if isinstance(arg, Tensor):
            address = arg.data_ptr()
            values.append(address)
            kinds.append((arg.dtype, "unaligned") if address % ALIGNMENT else arg.dtype)
        else:
            values.append(arg)
            if type(arg) is int:
                kinds.append(_kind_of_number(arg))
            elif isinstance(arg, TensorDescriptor):
                kinds.append((arg.base.dtype, *arg.block_shape))
            else:
                kinds.append(type(arg).__name__)  # float, or None, which is a constant
    return values, tuple(kinds)


def _kind_of_number(number: int) -> int:
    if number == 1:
        return 1
    kind = 2 if number % ALIGNMENT else 3
    return kind if -INT32_MAX <= number <= INT32_MAX else kind + 2
