# SPDX-License-Identifier: Apache-2.0
"""Where the benchmarks keep what they make and what they measure."""

from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
CACHE = ROOT / ".cache"
DQRELO = ["-m", "dqrelo_tools.cli"]  # arguments of Python
