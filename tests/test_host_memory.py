# SPDX-License-Identifier: Apache-2.0
"""Free memory in a container, of both versions of cgroups."""

import psutil
import pytest

from vllm_dqrelo.host_memory import V1, V2, available

GIB = 2**30
# "Lines of /proc/self/cgroup", the folder of the cgroup, and its version.
PLACES = {
    "v2": ("0::/\n", "", V2),
    "v2, the host's path in a container": ("0::/kubepods/pod1/x\n", "", V2),
    "v2, a limit of the slice above": ("0::/a.slice/b.scope\n", "a.slice", V2),
    "v1": ("4:cpu,cpuacct:/\n3:memory:/docker/x\n0::/\n", "memory/docker/x", V1),
    "v1, the root in a container": ("3:memory:/docker/x\n", "memory", V1),
}


@pytest.fixture
def free():
    """On the machine; more than any limit below."""
    return psutil.virtual_memory().available


def limited(root, place, names, limit):
    """A cgroup that used 300 MiB, 100 MiB of which are pages of files."""
    folder = root / place
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{300 * 2**20}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{names[2]} {100 * 2**20}\nslab 1\n")


@pytest.mark.parametrize("name", PLACES)
def test_a_limit_counts(tmp_path, name):
    lines, place, names = PLACES[name]
    (tmp_path / "own").write_text(lines)
    limited(tmp_path / "cgroup", place, names, 500 * 2**20)
    assert available(tmp_path / "cgroup", tmp_path / "own") == 300 * 2**20


def test_the_least_counts(tmp_path):
    (tmp_path / "own").write_text("0::/a/b\n")
    limited(tmp_path, "a", V2, 400 * 2**20)
    limited(tmp_path, "a/b", V2, 500 * 2**20)
    assert available(tmp_path, tmp_path / "own") == 200 * 2**20
    limited(tmp_path, "a", V2, 50 * 2**20)  # over its limit
    assert available(tmp_path, tmp_path / "own") == 0


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", "", None])
def test_without_a_limit_the_machine_counts(tmp_path, free, limit):
    (tmp_path / "own").write_text("0::/\n")
    if limit is not None:
        limited(tmp_path, "", V2, limit)
    assert abs(available(tmp_path, tmp_path / "own") - free) < 4 * GIB
    assert available(tmp_path, tmp_path / "nothing") > 0
