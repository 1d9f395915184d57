# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's two model runners a test session is of.

V1, which is vLLM's choice on a CPU, or with VLLM_USE_V2_MODEL_RUNNER=1 V2, which is its
choice on a GPU and runs in Triton's interpreter here.
"""

import os
import sys
from pathlib import Path

VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
MODULES = {
    "0": "vllm.v1.worker.cpu_model_runner",
    "1": "vllm.v1.worker.cpu.model_runner",
}


def use_v2() -> None:
    """Let this process, and those that it starts, find Triton's backend "cpu"."""
    folder = str(Path(__file__).parent / "v2")
    sys.path.insert(0, folder)
    paths = filter(None, (folder, os.environ.get("PYTHONPATH")))
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ["TRITON_INTERPRET"] = "1"
    _cast_masks()


def _cast_masks() -> None:
    """Make each mask of Triton's interpreter boolean.

    Triton 3.9 refuses the mask of vLLM's kernel for n-gram drafts, of integers
    (v1/worker/gpu/spec_decode/ngram/speculator.py:261), which a GPU takes.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def casting(access, position):
        def cast(self, *args):
            args, mask = list(args), args[position]
            args[position] = TensorHandle(mask.data.astype(bool), mask.dtype)
            return access(self, *args)

        return cast

    for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
        access = getattr(InterpreterBuilder, name)
        setattr(InterpreterBuilder, name, casting(access, position))


def prepare() -> None:
    """Undo what an engine before, or the interpreter, would do to the next engine."""
    from vllm import envs
    from vllm.v1.sample.ops import topk_topp_sampler

    envs.disable_envs_cache()  # a test may have set variables since
    # The interpreter counts the rows of the kernel for top-k in Python's integers.
    topk_topp_sampler.HAS_TRITON = False


def check(llm) -> None:
    """See that an engine has the runner of this session, or one is tested twice."""
    modules = llm.llm_engine.engine_core.engine_core.collective_rpc(
        lambda worker: type(worker.model_runner).__module__
    )
    assert set(modules) == {MODULES[os.environ[VARIABLE]]}
