# SPDX-License-Identifier: Apache-2.0
"""The tests of the kernels on this GPU: those marked ``gpu``, then all of their files.

Without a GPU those files run in Triton's interpreter, a few of their tests if sizes
are tiny.
"""

import subprocess
import sys
import time

from benchmarks.gpu.part import HAS_GPU, TINY, options
from benchmarks.paths import ROOT
from benchmarks.reliability.vllm_versions import counted, outcomes
from benchmarks.table import Table

FILES = ["tests/test_triton.py", "tests/test_triton_rowwise.py"]
PASSES = {"gpu": ["-m", "gpu"], "others": ["-m", "not gpu"]}
FEW = ["-k", "test_norm"]
COLUMNS = ("tests", "passed", "failed", "errors", "skipped", "first_failure")
COLUMNS += ("seconds",)


def main() -> None:
    """Run pytest, and write what it found after each pass."""
    found = options()
    table = Table(found.output / "tests.csv", ("tests",), COLUMNS)
    codes = []
    for name, chosen in PASSES.items():
        report, start = found.output / f"tests-{name}.xml", time.perf_counter()
        few = FEW if found.sizes is TINY and not HAS_GPU else []
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
        done = subprocess.run([*command, *chosen, *few, *FILES], cwd=ROOT, check=False)
        codes.append(done.returncode)
        counts = counted(list(outcomes(report)))
        seconds = round(time.perf_counter() - start)
        table.add({"tests": name, **counts, "seconds": seconds})
    if any(codes):
        raise SystemExit(f"pytest ended with {codes}")


if __name__ == "__main__":
    main()
