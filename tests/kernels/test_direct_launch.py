"""Launches without Triton's binder find the kernel that it would have found."""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
CONSTANTS = (16, 8, 64, 16, 8, 64, True)


def tensors(count: int) -> list[torch.Tensor]:
    return [torch.zeros(64) for _ in range(count)]


def test_what_triton_compiles_apart_is_apart_here() -> None:
    """Of all pairs of arguments that differ in type, alignment or number."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature
    from triton.tools.tensor_descriptor import TensorDescriptor

    from pdray.kernels.attention.decode_triton import merge_kernel
    from pdray.kernels.attention.prefill_triton import prefill_kernel
    from pdray.kernels.direct_launch import describe

    backend = make_backend(GPUTarget("cuda", 90, 32))
    plain = torch.zeros(64)
    pointers: list[Any] = [plain, plain[1:], plain[4:], plain.bfloat16(), plain.long(), None]
    numbers = [0, 1, 2, 15, 16, 24, 4096, 4097, 2**31 - 1, 2**31, 2**31 + 16, 2**40 + 1, -3, -16, -(2**35)]
    wide = torch.zeros(32, 32, dtype=torch.float16)
    tiles = [TensorDescriptor.from_tensor(each, [rows, 16]) for each in (wide, wide.bfloat16()) for rows in (8, 16)]
    for kernel, num_places in ((merge_kernel, 6), (prefill_kernel, 15)):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        num_constants = len(kernel.params) - num_places
        for place, values in itertools.product(range(num_places), ([*pointers, *numbers], [*tiles, 0.5])):
            seen = []
            for value in values:
                args = [*tensors(3), *[7] * (num_places - 3)]
                args[place] = value
                seen.append((str(bind(*args, *[4] * num_constants)[1]), describe(tuple(args))[1]))
            for (triton_one, one), (triton_other, other) in itertools.combinations(seen, 2):
                assert triton_one == triton_other or one != other, (kernel, place, triton_one, triton_other)


def test_a_kernel_is_compiled_once_for_each_kind_of_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    from pdray.kernels import direct_launch
    from pdray.kernels.attention.rotary_store_triton import rotate_and_store_kernel

    compiled: list[tuple[Any, ...]] = []
    launched: list[tuple[Any, ...]] = []

    class Kernel(JITFunction[Any]):
        def warmup(self, *args: Any, grid: Any, **options: Any) -> Any:
            compiled.append((args[-len(CONSTANTS) :], options))
            number = len(compiled)
            return SimpleNamespace(run=lambda *a: launched.append(a), function=number, packed_metadata="metadata")

    monkeypatch.setattr(direct_launch, "current_stream", lambda: 5)
    kernel = direct_launch.DirectKernel(Kernel(rotate_and_store_kernel.fn))
    args = *tensors(8), 1e-6
    kernel.launch((3, 2, 1), args, CONSTANTS, num_warps=1)
    kernel.launch((9, 2, 1), (*tensors(8), 1e-5), CONSTANTS, num_warps=1)  # other places, another number
    assert compiled == [(CONSTANTS, {"num_warps": 1, "DEPENDENT": False})]
    addresses = [arg.data_ptr() for arg in args[:8]]
    hooks = None, None, None
    assert launched[0] == (3, 2, 1, 5, 1, "metadata", *hooks, *addresses, 1e-6, *CONSTANTS, False)
    assert launched[1][:5] == (9, 2, 1, 5, 1)
    kernel.launch((3, 2, 1), (args[0][1:], *args[1:]), CONSTANTS, num_warps=1)
    kernel.launch((3, 2, 1), args, (8, *CONSTANTS[1:]), num_warps=1)
    kernel.launch((3, 2, 1), args, CONSTANTS, num_warps=2, num_stages=4)
    kernel.launch((3, 2, 1), (args[0], None, None, *args[3:]), (*CONSTANTS[:-1], False), num_warps=1)
    assert [launch[4] for launch in launched] == [1, 1, 2, 3, 4, 5]
    assert compiled[3][1] == {"num_warps": 2, "num_stages": 4, "DEPENDENT": False}
