# SPDX-License-Identifier: Apache-2.0
"""The model card of a delta: what it is, of which base, and how good."""

import json
import logging
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from dqrelo_tools.report import Report
from vllm_dqrelo.format.config import DeltaConfig
from vllm_dqrelo.format.errors import DqreloError

logger = logging.getLogger(__name__)

CARD = "README.md"
REPORT = "report.json"

TEXT = """
# {title}

A full fine-tune of `{base}`, stored as the change from it: {size:,} bytes,
{bits:.3f} bits per weight. It needs that base.

```bash
pip install "vllm-dqrelo[vllm]"
vllm serve {base} --quantization dqrelo --lora-modules NAME=THIS_FOLDER
```

Configuration:

```json
{config}```

What the compression lost of the change:

```
{report}
```

`report.json` has the numbers of each parameter.
"""


def write_card(folder: Path, config: DeltaConfig, report: Report, model: Path) -> None:
    """Write README.md and report.json into a delta folder.

    A base that is a folder of this machine is not named in the metadata. The licence
    is the fine-tune's own, if its card names one.

    Args:
        folder: of the delta.
        config: as written.
        report: of the conversion, with the size of the tensors.
        model: the folder of the fine-tune.
    """
    name = config.base_model_name_or_path
    on_hub = not Path(name).exists()
    data = ModelCardData(
        base_model=name if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="vllm-dqrelo",
        license=licence_of(model),
        tags=["dqrelo", "vllm"],
    )
    text = TEXT.format(
        title=model.name,
        base=name if on_hub else Path(name).name,
        size=report.delta_bytes,
        bits=report.bits_per_weight,
        config=config.to_json(),
        report=report.to_text(),
    )
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n{text}")
    (folder / REPORT).write_text(json.dumps(report.to_dict(), indent=2) + "\n")


def read_report(folder: Path) -> Report:
    """The report of the conversion, from the folder of its delta.

    Raises:
        FileNotFoundError: the folder lacks the report.
        DqreloError: another version wrote the report, or it is damaged.
    """
    path = folder / REPORT
    try:
        return Report.from_dict(json.loads(path.read_text()))
    except (KeyError, TypeError, ValueError) as error:
        raise DqreloError(
            f"{path} is not a report of this version: {error!r}"
        ) from error


def licence_of(model: Path) -> str | None:
    """The licence that the card of the fine-tune names, or None."""
    card = model / CARD
    if not card.is_file():
        return None
    try:
        return ModelCard.load(card).data.get("license")
    except Exception as error:  # of the file, of its YAML, of what that means
        logger.warning(
            "%s cannot be read (%s): the delta's card names no license", card, error
        )
        return None
