# SPDX-License-Identifier: Apache-2.0
"""delta_config.json: what a delta is and which base it belongs to."""

import json
import math
import os
import re
import reprlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vllm_dqrelo.format.errors import DqreloError, refuse
from vllm_dqrelo.format.json_file import read_json
from vllm_dqrelo.format.kinds import explain, refuse_broken

CONFIG_NAME = "delta_config.json"
DIGEST = re.compile("sha256:[0-9a-f]{64}")
MOST_TEXT = 4096  # of a value, which errors repeat
FORMAT_VERSION = 1
VOCAB_SIZE = "vocab_size"  # a key that may be left out
METHODS = DQRELO, PAPER = "dqrelo", "dqrelo-paper"  # that a converter may choose
LORA = "lora"  # the method of a delta that was a LoRA adapter
DEFAULT_RATIO = 1 / 8  # of ``convert``, and of the deltas that a server has room for
MAX_SHARD_SIZE = 10**9  # bytes of a file with tensors, by default


@dataclass(frozen=True)
class DeltaConfig:
    """The keys of delta_config.json, all of them required but ``vocab_size``.

    Attributes:
        format_version: 1.
        base_model_name_or_path: the base as it was named to the converter.
        base_fingerprint: ``checkpoint.fingerprint`` of the base.
        digest: ``delta.digest`` of the tensors and of the other keys.
        method: how the matrices were compressed, for the reader.
        ratio: the target size, as a fraction of 16 bits per weight.
        vocab_size: the fine-tune's, where it is smaller than the base's; else None, and
            the file lacks the key.
    """

    base_model_name_or_path: str
    base_fingerprint: str
    digest: str
    method: str
    ratio: float
    format_version: int = FORMAT_VERSION
    vocab_size: int | None = None

    @classmethod
    def from_dict(cls, raw: object, where: str) -> "DeltaConfig":
        """Check the parsed JSON ``raw`` of the file named ``where``."""
        if not isinstance(raw, dict):
            raise DqreloError(f"{where} is not a JSON object")
        # The version first: a newer one explains every other difference.
        if raw.get("format_version") != FORMAT_VERSION:
            version = reprlib.repr(raw.get("format_version"))
            raise DqreloError(
                f"{where} has format_version {version}; this "
                f"vllm-dqrelo reads version {FORMAT_VERSION}. Upgrade vllm-dqrelo, or "
                "convert the fine-tune again."
            )
        expected: dict[str, Any] = {field.name: field.type for field in fields(cls)}
        expected[VOCAB_SIZE] = int
        problems = [f"unknown key {key!r}" for key in sorted(raw.keys() - expected)]
        missing = expected.keys() - raw.keys() - {VOCAB_SIZE}
        problems += [f"missing key {key!r}" for key in sorted(missing)]
        for key in expected.keys() & raw.keys():
            kind = expected[key]
            if not isinstance(raw[key], (int, float) if kind is float else kind):
                got = reprlib.repr(raw[key])
                problems.append(f"{key} must be a {kind.__name__}, got {got}")
            elif kind is float and not abs(raw[key]) < math.inf:
                problems.append(f"{key} must be finite, got {raw[key]}")
            elif kind is str and not _is_text(raw[key]):
                problems.append(f"{key} must be text of at most {MOST_TEXT} characters")
            elif key == "digest" and not DIGEST.fullmatch(raw[key]):
                got = reprlib.repr(raw[key])
                problems.append(f"digest must be sha256: and 64 hex digits, got {got}")
            elif key == VOCAB_SIZE and (raw[key] is True or raw[key] < 1):
                problems.append(f"{key} must be at least 1, got {raw[key]}")
        refuse(f"{where} cannot be used:", problems)
        return cls(**raw)

    @classmethod
    def read(cls, folder: Path) -> "DeltaConfig":
        """Read and check the delta_config.json of ``folder``."""
        path = folder / CONFIG_NAME
        if not os.path.lexists(path):
            raise FileNotFoundError(explain(folder, "delta"))
        refuse_broken(folder)
        return cls.from_dict(read_json(path), str(path))

    def check_base(self, fingerprint: str, base: str, delta: str) -> None:
        """Refuse a base other than the base of ``delta``."""
        if fingerprint != self.base_fingerprint:
            raise DqreloError(
                f"{delta} belongs to another base: it was made from "
                f"{self.base_model_name_or_path} ({self.base_fingerprint}), but "
                f"{base} is {fingerprint}. Serve it with that base, or convert the "
                "fine-tune against this one."
            )

    def to_dict(self) -> dict[str, Any]:
        """The keys that the file has."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def to_json(self) -> str:
        """The file's text: sorted keys, two spaces, newline at the end."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


def _is_text(value: str) -> bool:
    """Whether it can be printed: no lone surrogates, not without end."""
    return len(value) <= MOST_TEXT and not any("\ud800" <= c <= "\udfff" for c in value)
