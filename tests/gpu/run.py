"""Everything that only a GPU can show, as one table; exits 1 if something did not hold.

PYTHONPATH must hold the repository's root, or pdray be installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import torch
from failures import check_failures
from graphs import check_graphs
from models import check_models
from nccl_system import check_lent, check_nccl, check_two
from partitions import check_partitions
from pipeline import check_pipeline
from rank_pairs import check_rank_pairs
from ranks import check_ranks
from rows import Row, print_header, print_rows
from shared_gpu import check_shared
from text import check_memory, check_text


def check_kernels() -> Iterator[Row]:
    """Triton kernels against their torch references."""
    folder = Path(__file__).parents[1] / "kernels"
    sys.path.append(str(folder))
    for path in sorted(folder.glob("*_cases.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        cases = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(cases)
        torch.manual_seed(0)
        for name, check in cases.CHECKS.items():
            try:
                check()
            except AssertionError as error:
                yield Row(
                    f"kernels: {name}", str(error).splitlines()[0] if str(error) else "differs", "reference", False
                )
            else:
                yield Row(f"kernels: {name}", "equal", "reference", True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, help="SmolLM2's weights, for text")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=[
            "kernels",
            "models",
            "graphs",
            "failures",
            "partitions",
            "pipeline",
            "ranks",
            "text",
            "memory",
            "shared",
            "nccl",
            "cuda_ipc",
            "two",
        ],
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing was checked", file=sys.stderr)
        return 1
    checks: dict[str, Callable[[], Iterator[Row]]] = {
        "kernels": check_kernels,
        "models": check_models,
        "graphs": check_graphs,
        "failures": check_failures,
        "partitions": check_partitions,
        "pipeline": check_pipeline,
        "ranks": lambda: chain(check_ranks(), check_rank_pairs()),
        "text": lambda: check_text(args.gguf),
        "memory": lambda: check_memory(args.gguf),
        "shared": lambda: check_shared(args.gguf),
        "nccl": lambda: check_nccl(args.gguf),
        "cuda_ipc": lambda: check_lent(args.gguf),
        "two": lambda: check_two(args.gguf),
    }
    print_header()
    held = [print_rows(checks[name]()) for name in args.rows or checks]
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
