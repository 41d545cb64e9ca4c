"""`benchmarks.sglang_accuracy` on the CPU; its arguments are that module's."""

import sys

import engines.sglang.cpu
import engines.sglang.cpu_host_pools  # noqa: F401  both are imported first in every process of the engine

from benchmarks.sglang_accuracy import main

if __name__ == "__main__":
    sys.exit(main())
