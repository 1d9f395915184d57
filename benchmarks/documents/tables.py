# SPDX-License-Identifier: Apache-2.0
"""The tables of README and docs, from the files in results/: name -> Markdown."""

from benchmarks.documents import memory_tables as memory
from benchmarks.documents import quality_tables as quality
from benchmarks.documents import reliability_tables as reliability
from benchmarks.documents import serving_tables as serving
from benchmarks.documents import step_tables as step
from benchmarks.documents.rows import read, read_json


def tables() -> dict[str, str]:
    """Every block of every document."""
    rows, scales = read("quality.csv"), quality.fine_tunes()
    names = quality.complete(rows)
    return {
        "scale": quality.scale_table(scales),
        "fine-tunes": quality.fine_tune_table(rows, scales),
        "quality": quality.quality_table(rows, scales, names),
        "methods": quality.method_table(rows, names),
        "sizes": quality.method_table(rows, quality.detailed(rows), seconds=True),
        "halves": quality.halves_table(read("halves.csv")),
        "shares": quality.shares_table(read("shares.csv")),
        "strength": quality.strength_table(read("strength.csv")),
        "quantized": quality.quantized_table(read("quantized.csv")),
        "convert": quality.convert_table(read("convert.csv")),
        "cpu": step.cpu_table(read("cpu.csv")),
        "amx": step.amx_table(read("amx.csv")),
        "lanes": step.lanes_table(read("lanes.csv")),
        "vectors": step.vectors_table(read("vectors.csv")),
        "roofline": step.roofline_table(read("kernels_predicted.csv")),
        "predictions": quality.prediction_table(rows, read("predicted.csv")),
        "kl-predictions": quality.kl_prediction_table(rows, scales),
        "serving": serving.serving_table(read("serving.csv")),
        "serving-compare": serving.compare_table(read("serving_compare.csv")),
        "memory": memory.memory_table(read("memory.csv")),
        "bytes": memory.bytes_table(read("memory.csv")),
        "bases": memory.bases_table(read("bases.csv")),
        "workers": memory.workers_table(read("workers.csv")),
        "cards": memory.cards_table(read("cards.csv")),
        "capacity": serving.capacity_table(read("capacity.csv")),
        "router": serving.router_table(read("router.csv")),
        "versions": reliability.versions_table(read("versions.csv")),
        "fuzz": reliability.fuzz_table(read("fuzz.csv")),
        "fuzz_server": reliability.fuzz_server_table(read("fuzz_server.csv")),
        "soak": reliability.soak_table(read_json("soak.json")),
        "demo": quality.demo_table(read_json("demo.json")),
        "plan": memory.plan_table(read_json("plan.json")),
    }
