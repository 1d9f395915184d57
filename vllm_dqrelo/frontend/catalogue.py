# SPDX-License-Identifier: Apache-2.0
"""The delta folders that a server may load, and the names that reach them."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vllm_dqrelo.format.checkpoint import resolve
from vllm_dqrelo.format.config import CONFIG_NAME, DeltaConfig
from vllm_dqrelo.format.delta import weight_files
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.folder import file_bytes

DELTA_DIR = "DQRELO_DELTA_DIR"
MOST_NAME, MOST_PATH = 255, 4096  # bytes, Linux's limits
HUB_NAMESPACE = "DQRELO_HUB_NAMESPACE"


@dataclass(frozen=True)
class DeltaInfo:
    """A delta folder, without its tensors.

    Attributes:
        folder: its path.
        digest: of its content.
        ratio: the target size, as a fraction of 16 bits per weight.
        size: bytes of the files with tensors.
        created: when the folder was written, in seconds since 1970.
    """

    folder: Path
    digest: str
    ratio: float
    size: int
    created: int

    @classmethod
    def read(cls, folder: Path) -> "DeltaInfo":
        """Read delta_config.json and the sizes of the files.

        Raises:
            DqreloError: delta_config.json is damaged. OSError: a file is missing.
        """
        config = DeltaConfig.read(folder)
        size = file_bytes(weight_files(folder))
        created = int((folder / CONFIG_NAME).stat().st_mtime)
        return cls(folder, config.digest, config.ratio, size, created)


class Catalogue:
    """Folders of deltas: each sub-folder is a delta, its name the model's.

    Each call lists the folders again, which finds deltas that were added meanwhile.

    Args:
        folders: a server may load their sub-folders.
        namespaces: users and organisations of the Hugging Face Hub. A server may load
            their repositories.

    Raises:
        DqreloError: not a folder.
    """

    def __init__(self, folders: Sequence[str], namespaces: Sequence[str] = ()) -> None:
        paths = [Path(folder).expanduser() for folder in folders]
        for path in paths:
            if not path.is_dir():
                raise DqreloError(f"{path} is not a folder: give a folder of deltas")
        self.folders = [path.resolve() for path in paths]
        self.namespaces = set(namespaces)
        self._given: list[Path] = []

    @classmethod
    def from_environment(cls) -> "Catalogue":
        """``DQRELO_DELTA_DIR``, ``DQRELO_HUB_NAMESPACE``: separated as in ``PATH``."""
        given = [os.environ.get(name, "") for name in (DELTA_DIR, HUB_NAMESPACE)]
        folders, namespaces = (list(filter(None, v.split(os.pathsep))) for v in given)
        return cls(folders, namespaces)

    def give(self, folder: str) -> None:
        """Allow one delta folder, which the user gave at start, by its path."""
        self._given.append(Path(folder).resolve())

    def find(self, name: str) -> Path:
        """The folder of the delta called ``name``.

        Raises:
            FileNotFoundError: not a delta of the catalogue.
            DqreloError: two folders have the name, or a link leads outside.
        """
        if not is_name(name):
            raise FileNotFoundError(f"{name[:MOST_NAME]!r} is not the name of a delta")
        found = [folder / name for folder in self.folders if (folder / name).is_dir()]
        if not found:
            raise FileNotFoundError(f"{name} is not a delta of this server")
        if len(found) > 1:
            raise DqreloError(f"{name} is ambiguous: {', '.join(map(str, found))}")
        return self._inside(found[0])

    def names(self) -> list[str]:
        """The names of all folders that have a delta_config.json, which is not read."""
        found = set()
        for folder in self.folders:
            with suppress(OSError):  # the folder was removed
                found |= {p.name for p in folder.iterdir() if has_config(p)}
        return sorted(filter(is_name, found))

    def list(self) -> dict[str, DeltaInfo]:
        """All deltas, by name; folders that cannot be read are skipped."""
        infos = {}
        for name in self.names():
            try:
                infos[name] = DeltaInfo.read(self.find(name))
            except (DqreloError, OSError):
                continue
        return infos

    def allowed(self, path: str) -> Path:
        """The folder of ``path``, if a request may load that folder.

        Args:
            path: a folder, or a repository of the Hub, which is fetched.

        Raises:
            DqreloError: a request must not load it. FileNotFoundError: it is missing.
        """
        if "\0" in path or len(path) > MOST_PATH:
            raise DqreloError(f"{path[:MOST_NAME]!r} is not a path")
        folder, parts = real(Path(path)), path.split("/")
        if len(parts) == 2 and parts[0] in self.namespaces and not folder.exists():
            return resolve(path)
        if folder in self._given:
            return folder
        if not any(folder.is_relative_to(parent) for parent in self.folders):
            raise DqreloError(
                f"{path} must not be loaded: expected a folder inside "
                f"{self._expected()}. Start the server with --delta-dir to allow it"
            )
        if not folder.is_dir():
            raise FileNotFoundError(f"{path} is not a folder")
        return self._inside(folder)

    def _expected(self) -> str:
        return " or ".join(map(str, self.folders)) or "a --delta-dir, but none is given"

    def _inside(self, folder: Path) -> Path:
        """``folder``, unless a link leads it or one of its files outside."""
        for path in (folder, *folder.iterdir()):
            if not any(real(path).is_relative_to(f) for f in self.folders):
                raise DqreloError(
                    f"{path} is a link to {real(path)}, which is outside "
                    f"{self._expected()}; copy the target of the link"
                )
        return folder


def is_name(name: str) -> bool:
    """Whether ``name`` can name a folder, and JSON can represent ``name``."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return False
    plain = name not in ("", ".", "..") and "/" not in name and "\0" not in name
    return plain and size <= MOST_NAME


def has_config(folder: Path) -> bool:
    """Whether ``folder`` has an entry delta_config.json, of any kind."""
    return os.path.lexists(folder / CONFIG_NAME)


def real(path: Path) -> Path:
    """``path`` with all links resolved; a circle of links is not an error."""
    return Path(os.path.realpath(path))
