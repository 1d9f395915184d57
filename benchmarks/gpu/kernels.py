# SPDX-License-Identifier: Apache-2.0
"""The table of benchmarks/ops/gpu.py: the shapes that say most."""

from benchmarks.ops.device import interpret

interpret()

from benchmarks.gpu.part import options  # noqa: E402
from benchmarks.ops.gpu import main  # noqa: E402

FULL = "--deltas 1 4 16 32 --rows 1 16 256 --repeats 30"
TINY = "--tiny --factors bfloat16 --deltas 1 2 --rows 1 --repeats 1"

if __name__ == "__main__":
    found = options()
    shapes = (TINY if found.tiny else FULL).split()
    main(["--output", str(found.output / "kernels.csv"), *shapes])
