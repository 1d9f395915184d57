# SPDX-License-Identifier: Apache-2.0
"""What Triton and ptxas make of the kernels, read without a GPU.

Compiles what the launchers would launch for one linear layer of Llama-3-8B and
prints, for each kernel: registers, bytes of stack (spills), shared memory, and for
the matrix products how many instructions the loop over K has per element that it
streams (a sign, or an element of A). Nothing is timed.

    python -m benchmarks.ops.sass_report --target 80 90
"""

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from dqrelo_kernels.gpu import low_rank, merge, rowwise, sign_matmul
from dqrelo_kernels.layout import BLOCK
from dqrelo_kernels.table import empty_table

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
# Address, name, and the last operand where it is an address.
INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?"
    r"([A-Z0-9_]+)[^;]*?(0x[0-9a-f]+)?\s*;",
    re.MULTILINE,
)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch."""

    def __getitem__(self, grid: tuple[int, ...]) -> "Recorder":
        return self

    def __call__(self, **arguments: Any) -> None:
        self.arguments = arguments


def launches(
    rows: int, dtype: torch.dtype, k: int, slots: int
) -> dict[Any, dict[str, Any]]:
    """Kernel -> launch arguments, for K columns and a fused q/k/v projection."""
    recorders = {
        (module, name): Recorder()
        for module, name in (
            (low_rank, "_low_rank_kernel"),
            (sign_matmul, "_sign_matmul_kernel"),
            (rowwise, "_embedding_kernel"),
            (rowwise, "_norm_kernel"),
            (merge, "_merge_kernel"),
        )
    }
    with FakeTensorMode(), ExitStack() as stack:
        for (module, name), recorder in recorders.items():
            stack.enter_context(patch.object(module, name, recorder))
        for module in (low_rank, sign_matmul):
            stack.enter_context(patch.object(module, "programs", lambda *_: 1))
        x = torch.empty(rows, k, dtype=dtype, device="cuda")
        y = torch.empty(rows, 6144, dtype=dtype, device="cuda")
        scratch = torch.empty(rows, 1024, device="cuda")
        arena = torch.empty(1024, dtype=torch.uint8, device="cuda")
        table = empty_table(slots, 3, "cuda")
        slices, groups, starts = (
            torch.empty(size, dtype=torch.int32, device="cuda")
            for size in (4, rows, slots + 1)
        )
        low_rank.low_rank(scratch, x, arena, table, groups, starts)
        sign_matmul.sign_matmul(y, scratch, x, arena, table, slices, groups, starts)
        rowwise.embedding(x, groups, arena, table, slices, groups, groups)
        rowwise.norm(x, x, arena, table, groups, groups, 1e-5, False)
        weight = torch.empty(6144, k, dtype=dtype, device="cuda")
        bias = torch.empty(6144, dtype=dtype, device="cuda")
        merge.merge(weight, bias, weight, None, arena, table, slices, 0)
    return {getattr(*kernel): r.arguments for kernel, r in recorders.items()}


def compile_for(kernel: Any, arguments: dict[str, Any], target: int) -> Any:
    """``kernel`` compiled for a compute capability as a launch would compile it."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and not parameter.do_not_specialize)
        ):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", target, 32),
        options={name: arguments[name] for name in OPTIONS if name in arguments},
    )


def disassemble(cubin: bytes, option: str) -> str:
    """What cuobjdump says about ``cubin``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), option, file.name]
        return subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout


def inner_loops(sass: str) -> list[Counter[str]]:
    """The instructions of every loop that has no other in it."""
    code = [
        (int(at, 16), name, int(to, 16) if to else None)
        for at, name, to in INSTRUCTION.findall(sass)
    ]
    spans = [(to, at) for at, name, to in code if name == "BRA" and to and to < at]
    inner = [
        (first, last)
        for first, last in spans
        if not any(
            first <= other[0] and other[1] <= last and other != (first, last)
            for other in spans
        )
    ]
    return [
        Counter(name for at, name, _ in code if first <= at <= last)
        for first, last in inner
    ]


def report(kernel: Any, arguments: dict[str, Any], target: int) -> str:
    """One line about one kernel."""
    compiled = compile_for(kernel, arguments, target)
    usage = disassemble(compiled.asm["cubin"], "-res-usage")
    registers, stack = re.findall(r"(?:REG|STACK):(\d+)", usage)
    line = (
        f"sm_{target} {kernel.__name__:19} {registers:>3} registers, {stack:>4} B "
        f"stack, {compiled.metadata.shared / 1024:5.1f} KiB shared"
    )
    if "BLOCK_M" not in arguments:
        return line
    # The first of them is the one over K, of int4 in low_rank; the others are B's, or
    # for other factor dtypes.
    loop = next(
        loop
        for loop in inner_loops(disassemble(compiled.asm["cubin"], "-sass"))
        if any(loop[name] for name in ("HMMA", "HGMMA", "FFMA"))
    )
    height = arguments.get("BLOCK_N") or arguments["BLOCK_R"]
    elements = height * arguments.get("BLOCK_K", BLOCK)
    per_thread = elements / 32 / arguments["num_warps"]
    return (
        f"{line}, tiles of {arguments['BLOCK_M']:2} rows, "
        f"{sum(loop.values()) / per_thread:.2f} instructions per element: "
        + ", ".join(f"{name} {count}" for name, count in loop.most_common(6))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 512])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--slots", type=int, default=64, help="times experts, if any")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    for target in options.target:
        for rows in options.rows:
            made = launches(rows, dtype, options.columns, options.slots)
            for kernel, arguments in made.items():
                print(report(kernel, arguments, target), flush=True)


if __name__ == "__main__":
    main()
