"""`python -m pdray`, and the `pdray` command."""

from __future__ import annotations

import sys

from pdray.interrupts import interrupts_end_the_process


def main() -> int:
    """Run one command of this process's arguments. Returns the exit status."""
    with interrupts_end_the_process():
        from pdray.cli import main as run
    return run()


if __name__ == "__main__":
    sys.exit(main())
