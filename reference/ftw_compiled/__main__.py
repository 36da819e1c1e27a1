"""``python -m ftw_compiled``: compile the solver ahead of time."""

import sys
import time

from .ahead import compile_kernels
from .compilation import is_ready


def main() -> int:
    """Compile, and say how long it took; 1 if it cannot be done."""
    if is_ready():
        print("the solver is compiled already")
        return 0
    start = time.perf_counter()
    try:
        compile_kernels()
    except (ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"compiled in {time.perf_counter() - start:.0f} s; from now on training steps use it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
