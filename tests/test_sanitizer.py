# SPDX-License-Identifier: Apache-2.0
"""The native ops touch no memory but their own: their tests under AddressSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# The last -O counts: -O3 with the checks takes half a minute to compile.
COMPILER = """#!/bin/sh
exec g++ "$@" -O1 -g1 -fsanitize=address
"""


def runtime() -> str:
    """The library of the checks, which has to be there before Python is."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    command = ["g++", "-print-file-name=libasan.so"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if not Path(found.strip()).is_absolute():
        pytest.skip("g++ has no AddressSanitizer")
    return found.strip()


@pytest.mark.slow
def test_native_ops_under_the_address_sanitizer(tmp_path):
    """Also what they take from their own workspace, of which the rest is poisoned."""
    compiler = tmp_path / "g++-asan"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
        + [
            "tests/test_ops.py",
            "tests/test_experts.py",
            "-k",
            "native and (delta_linear and bfloat16 or embedding or expert_linear)",
        ],
        cwd=Path(__file__).parents[1],
        env={
            **os.environ,
            "CXX": str(compiler),
            "XDG_CACHE_HOME": str(tmp_path),
            "LD_PRELOAD": runtime(),
            "ASAN_OPTIONS": "detect_leaks=0",
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[:4000]
    assert "skipped" not in run.stdout
    assert list(tmp_path.rglob("cpu-*.so")), "nothing was built with the checks"
