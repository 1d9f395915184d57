# SPDX-License-Identifier: Apache-2.0
"""What a delta folder says of itself, without its base."""

from pathlib import Path
from typing import Any

from dqrelo_tools.text_table import text_table
from vllm_dqrelo.format.config import CONFIG_NAME
from vllm_dqrelo.format.delta import MODEL, Delta, weight_files
from vllm_dqrelo.format.folder import file_bytes
from vllm_dqrelo.format.tensor_file import text_of
from vllm_dqrelo.format.tensors import INT4


def describe(folder: Path) -> dict[str, Any]:
    """Open a delta and list its configuration and parameters.

    Raises:
        DqreloError: it is damaged. FileNotFoundError: it is not there.
    """
    delta = Delta(folder)
    matrices = {}
    for name in delta.matrices:
        matrix = delta.matrix(name)
        matrices[name] = {
            "shape": list(matrix.shape),
            "planes": matrix.planes,
            "rank": matrix.rank,
            "factors": "int4"
            if matrix.lora_a.dtype == INT4
            else text_of(matrix.lora_a.dtype),
        }
    return {
        **delta.config.to_dict(),
        "bytes": file_bytes(weight_files(folder)),
        "matrices": matrices,
        "exact": {name: list(delta.parameter(name).shape) for name in delta.exact},
        "other_files": sorted(
            path.name
            for path in folder.iterdir()
            if path.name != CONFIG_NAME and not path.name.startswith(MODEL)
        ),
    }


def to_text(description: dict[str, Any]) -> str:
    """The description for people: one line a matrix."""
    facts = [
        (key, f"{value:,}" if key == "bytes" else value)
        for key, value in description.items()
        if not isinstance(value, dict | list)
    ]
    facts += [
        ("exact parameters", len(description["exact"])),
        ("other files", ", ".join(description["other_files"]) or "none"),
    ]
    rows = [("shape", "planes", "rank", "factors", "matrix")]
    for name, matrix in description["matrices"].items():
        shape = " x ".join(map(str, matrix["shape"]))
        rows.append((shape, *(matrix[key] for key in rows[0][1:4]), name))
    return f"{text_table(facts, '<')}\n\n{text_table(rows, '>>>><')}"
