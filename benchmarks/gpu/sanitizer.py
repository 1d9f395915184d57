# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer over the kernels of one op: no access out of bounds."""

import shutil
import subprocess
import sys

from benchmarks.gpu.part import HAS_GPU, options, skip
from benchmarks.paths import ROOT

TOOL = "compute-sanitizer"
FAILED = 9  # its exit code when it has found an error
# A step of 33 rows of two deltas and the base. Nothing is a multiple of a tile.
STEP = """
import torch
from benchmarks.ops.linear_site import FACTORS, Site
site = Site([96, 40, 24], 512, 2, 1 / 8, FACTORS["int4"])
torch.ops.dqrelo.delta_linear_(**site.step(17))
torch.cuda.synchronize()
"""


def main() -> None:
    """Run one step of ``delta_linear_`` under the tool."""
    found = options()
    if not (tool := shutil.which(TOOL)):
        skip(f"{TOOL} is not on PATH")
    if not HAS_GPU:
        skip("needs a CUDA device")
    report = found.output / "sanitizer.txt"
    command = [tool, "--error-exitcode", str(FAILED), "--log-file", str(report)]
    done = subprocess.run([*command, sys.executable, "-c", STEP], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"{TOOL} ended with {done.returncode}: {report}")


if __name__ == "__main__":
    main()
