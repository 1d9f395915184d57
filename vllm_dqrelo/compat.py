# SPDX-License-Identifier: Apache-2.0
"""The tested range of vLLM, and the private names of vLLM that every process needs.

The private names of one process are in the ``compat.py`` of its folder. Each patch has
four lines: why it is needed, where in vLLM (0.32.0) it is, the issue or pull request of
vLLM about it, and until when it is needed. A name that is missing is an error that
names it.
"""

import functools
from collections.abc import Callable
from typing import Any

import vllm
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

__all__ = ["EngineArgs", "ModelConfig", "VllmConfig"]

# benchmarks/results/versions.csv has what the tests said of each release.
OLDEST, FIRST_UNTESTED = (0, 31), (0, 34)
_PATCHED = "_dqrelo"


def release() -> tuple[int, ...]:
    """The first two numbers of vLLM's version."""
    return tuple(int(part) for part in vllm.__version__.split(".")[:2])


def version_problem() -> str | None:
    """Why this vLLM cannot be used, or None."""
    if OLDEST <= release() < FIRST_UNTESTED:
        return None
    return (
        f"vllm-dqrelo is tested with vLLM {tested()}, this is {vllm.__version__}; "
        f'install it with pip install "vllm{tested()}"'
    )


def tested() -> str:
    """The tested range, as pip takes it."""
    return f">={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, FIRST_UNTESTED))}"


def says_why() -> bool:
    """Whether an engine's output has a field for the reason of a failure.

    Where: ``EngineCoreOutput.error``, v1/engine/__init__.py:247 in 0.33.0.
    """
    from vllm.v1.engine import EngineCoreOutput

    return "error" in EngineCoreOutput.__struct_fields__


def find(owner: Any, name: str) -> Any:
    """``owner.name``, or an error that names both."""
    found = getattr(owner, name, None)
    if found is None:
        raise RuntimeError(
            f"vLLM {vllm.__version__} has no {getattr(owner, '__name__', owner)}."
            f"{name}, which vllm-dqrelo needs: use a version it is tested with"
        )
    return found


def replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """``owner.name = wrap(owner.name)``, once."""
    found = find(owner, name)
    if not hasattr(found, _PATCHED):
        wrapped = wrap(found)
        setattr(wrapped, _PATCHED, True)
        setattr(owner, name, wrapped)


def after_create_model_config(hook: Callable[[EngineArgs, ModelConfig], None]) -> None:
    """Call ``hook`` when an engine has its ModelConfig.

    Why: the hook switches vLLM's LoRA control plane on, whose configuration is made
        from ``EngineArgs`` right after that.
    Where: ``EngineArgs.create_model_config``, engine/arg_utils.py:1943.
    Upstream: none.
    Until: a quantization method may change the engine's arguments.
    """

    def then(create: Callable[..., ModelConfig]) -> Callable[..., ModelConfig]:
        @functools.wraps(create)
        def create_model_config(self: Any, *args: Any, **kwargs: Any) -> ModelConfig:
            model_config = create(self, *args, **kwargs)
            hook(self, model_config)
            return model_config

        return create_model_config

    replace(EngineArgs, "create_model_config", then)


def keep_compilation(wanted: Callable[[VllmConfig], bool]) -> None:
    """Let vLLM compile an engine on the CPU although it has adapters, where ``wanted``.

    Why: vLLM's own operators for adapters cannot be compiled there. So it compiles no
        engine that has adapters.
    Where: ``CpuPlatform.check_and_update_config``, platforms/cpu.py:379.
    Upstream: none for the CPU; issue 10617 was the same on GPUs, closed.
    Until: vLLM compiles engines with adapters on the CPU.
    """
    if not current_platform.is_cpu():
        return

    def hiding(check: Callable[[VllmConfig], None]) -> Callable[[VllmConfig], None]:
        @functools.wraps(check)
        def check_and_update_config(vllm_config: VllmConfig) -> None:
            lora_config = vllm_config.lora_config
            if wanted(vllm_config):
                vllm_config.lora_config = None
            try:
                check(vllm_config)
            finally:
                vllm_config.lora_config = lora_config

        return check_and_update_config

    replace(current_platform, "check_and_update_config", hiding)
