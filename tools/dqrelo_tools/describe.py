# SPDX-License-Identifier: Apache-2.0
"""What a delta folder says of itself, without its base."""

from pathlib import Path
from typing import Any

from vllm_dqrelo.format.config import CONFIG_NAME
from vllm_dqrelo.format.delta import MODEL, Delta, weight_files
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
            else str(matrix.lora_a.dtype).removeprefix("torch."),
        }
    return {
        **delta.config.to_dict(),
        "bytes": sum(path.stat().st_size for path in weight_files(folder)),
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
    lines = []
    for key, value in description.items():
        if not isinstance(value, dict | list):
            lines.append(
                f"{key:<26}{value:,}" if key == "bytes" else f"{key:<26}{value}"
            )
    lines += [f"{'exact parameters':<26}{len(description['exact'])}"]
    lines += [f"{'other files':<26}{', '.join(description['other_files']) or 'none'}"]
    lines += ["", f"{'shape':>14}{'planes':>8}{'rank':>6}{'factors':>10}  matrix"]
    for name, matrix in description["matrices"].items():
        n, k = matrix["shape"]
        lines.append(
            f"{f'{n} x {k}':>14}{matrix['planes']:>8}{matrix['rank']:>6}"
            f"{matrix['factors']:>10}  {name}"
        )
    return "\n".join(lines)
