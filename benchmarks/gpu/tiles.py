# SPDX-License-Identifier: Apache-2.0
"""The fastest tiles of this GPU: into the results, and for the parts that follow."""

import shutil

from benchmarks.ops.device import HAS_GPU, interpret

interpret()

from benchmarks.gpu.part import options  # noqa: E402
from benchmarks.ops.tune_tiles import FILE, main  # noqa: E402

if __name__ == "__main__":
    found = options()
    path = found.output / "tiles.json"
    main(["--output", str(path), *["--tiny"] * found.tiny])
    if HAS_GPU and not found.tiny:
        shutil.copy(path, FILE)
