# SPDX-License-Identifier: Apache-2.0
"""An engine starts and checks itself: eager, or with graphs as vLLM makes them."""

import logging
import time
from typing import Any

from benchmarks.gpu.engine import engine, tokens
from benchmarks.gpu.models import base
from benchmarks.gpu.part import HAS_GPU, options, skip
from benchmarks.table import Table

SAID = "self-check"  # in the line that the plugin logs
COLUMNS = ("mode", "seconds", "said")


def kept_lines() -> list[str]:
    """A list to which each log line that has ``SAID`` is added from now on.

    vLLM configures its loggers again when an engine starts, and removes handlers.
    """
    lines: list[str] = []
    make = logging.getLogRecordFactory()

    def record_of(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if SAID in (line := record.getMessage()):
            lines.append(line)
        return record

    logging.setLogRecordFactory(record_of)
    return lines


def main() -> None:
    """Start the engine, and write how long that took and what the check said."""
    found = options("mode")
    if found.mode == "graphs" and not HAS_GPU:
        skip("graphs need a CUDA device")
    lines = kept_lines()
    start = time.perf_counter()
    llm = engine(
        base(found.models, found.sizes),
        found.sizes,
        quantization="dqrelo",
        max_loras=8,
        enforce_eager=found.mode == "eager",
        compilation_config={},
        additional_config={"dqrelo": {"self_check": "always"}},
    )
    seconds = round(time.perf_counter() - start, 1)
    llm.generate(tokens(8, 0, found.sizes), use_tqdm=False)
    if not lines:
        raise SystemExit(f"the engine logged no line with {SAID!r}")
    table = Table(found.output / f"start_{found.mode}.csv", ("mode",), COLUMNS)
    said = "; ".join(lines)
    table.add({"mode": found.mode, "seconds": seconds, "said": said})


if __name__ == "__main__":
    main()
