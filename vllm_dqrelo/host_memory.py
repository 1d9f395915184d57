# SPDX-License-Identifier: Apache-2.0
"""The memory of the host that this process can still take."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

Files = tuple[str, str, str]

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Files of a cgroup: its limit, its usage, and the key in memory.stat of pages of files
# that the kernel evicts before it kills a process. Versions 2 and 1 (cgroups(7)).
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available(cgroups: Path = CGROUPS, own: Path = OWN) -> int:
    """Bytes that are free on the machine and in the cgroups of this process.

    Semantics: ``min(available, limit - (usage - inactive file pages))`` over the
    process's cgroups that have a limit, such as a container's.

    Args:
        cgroups: where the kernel shows cgroups.
        own: the file that names this process's.
    """
    return min([psutil.virtual_memory().available, *left(cgroups, own)])


def left(cgroups: Path, own: Path) -> Iterator[int]:
    """What each limit leaves; a container sees its own cgroup as the root."""
    for root, names, path in hierarchies(cgroups, own):
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            with suppress(OSError, ValueError, KeyError):  # without a limit
                limit, usage = (int((place / name).read_text()) for name in names[:2])
                stat = (place / "memory.stat").read_text().split()
                pages = dict(zip(stat[::2], stat[1::2], strict=True))
                yield max(limit - (usage - int(pages[names[2]])), 0)
            if place == root:
                break


def hierarchies(cgroups: Path, own: Path) -> Iterator[tuple[Path, Files, str]]:
    """The root, the names of files and this process's path, of each version."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield cgroups, V2, path
            elif "memory" in controllers.split(","):
                yield cgroups / "memory", V1, path
