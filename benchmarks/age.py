# SPDX-License-Identifier: Apache-2.0
"""Which results are older than the code that they measure?"""

from benchmarks.machine import git
from benchmarks.paths import RESULTS
from benchmarks.table import read

OPS = ("kernels/dqrelo_kernels/cpu", "kernels/dqrelo_kernels/ops.py")
GPU = ("kernels/dqrelo_kernels/gpu",)
FILES = ("vllm_dqrelo/format",)
WORKER = ("vllm_dqrelo/worker",)
SERVED = (*OPS, *FILES, *WORKER, "vllm_dqrelo/engine", "vllm_dqrelo/frontend")
COMPRESSION = ("tools/dqrelo_tools/compress.py", "tools/dqrelo_tools/allocate.py")
COMPRESSION += ("tools/dqrelo_tools/method.py", "tools/dqrelo_tools/svd.py")
# A results file and the code that its numbers depend on.
MEASURES = {
    "amx.csv": OPS,
    "bases.csv": (*WORKER, "vllm_dqrelo/room.py"),
    "capacity.csv": SERVED,
    "cards.csv": FILES,
    "convert.csv": COMPRESSION,
    "cpu.csv": OPS,
    "finetunes.csv": ("benchmarks/quality",),
    "fuzz.csv": FILES,
    "fuzz_server.csv": SERVED,
    "halves.csv": COMPRESSION,
    "history.csv": OPS,
    "kernels_predicted.csv": GPU,
    "lanes.csv": OPS,
    "memory.csv": SERVED,
    "overhead.csv": SERVED,
    "predicted.csv": COMPRESSION,
    "quality.csv": COMPRESSION,
    "quantized.csv": COMPRESSION,
    "real.csv": (*COMPRESSION, *SERVED),
    "router.csv": SERVED,
    "serving.csv": SERVED,
    "serving_compare.csv": SERVED,
    "shares.csv": COMPRESSION,
    "strength.csv": COMPRESSION,
    "vectors.csv": OPS,
    "versions.csv": SERVED,
    "workers.csv": SERVED,
}


def older() -> list[str]:
    """The results files with rows older than their code, a line each.

    Rows whose commit is not in this checkout, or was not written down, count as older.
    A change of a comment makes rows older too: git does not know what a change means.
    """
    found = []
    for name, code in MEASURES.items():
        commits = {row.get("commit", "") for row in read(RESULTS / name)}
        changes = {commit: _changes(commit, code) for commit in commits}
        if None in changes.values():
            found.append(f"{name}: rows of unknown commits")
            continue
        oldest = max(changes, key=lambda commit: changes[commit] or 0)
        if changes[oldest]:
            found.append(f"{name}: {changes[oldest]} commits newer than {oldest}")
    return found


def _changes(commit: str, code: tuple[str, ...]) -> int | None:
    """How many commits changed the code after ``commit``; None if git does not know."""
    since = f"{commit.removesuffix('-dirty')}..HEAD"
    count = git("rev-list", "--count", since, "--", *code) if commit else ""
    return int(count) if count else None
