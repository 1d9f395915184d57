# SPDX-License-Identifier: Apache-2.0
"""What the plugin does to a vLLM process, and when.

``register`` runs in every process of every vLLM in this environment, also in
those that never use a delta. It therefore only makes ``--quantization dqrelo``
known, and looks at an engine that starts. The rest waits until that option is
given: the control plane is switched on when the engine's configuration is made,
the engine gets its deltas and its scheduler when it has its KV cache, and a worker
is patched when its model is built (quantization.py).
"""

import sys
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_dqrelo import __version__, compat
from vllm_dqrelo.frontend import compat as compat_frontend

logger = init_logger(f"vllm.{__name__}")


def register() -> None:
    """Make ``--quantization dqrelo`` known. Safe to call again."""
    if problem := compat.version_problem():
        logger.error("%s. --quantization dqrelo is not available.", problem)
        return
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    if "dqrelo" in QUANTIZATION_METHODS:
        return
    from vllm_dqrelo.quantization import DqreloConfig

    register_quantization_config("dqrelo")(DqreloConfig)
    compat.after_create_model_config(switch_on)
    if "vllm.entrypoints.cli.serve" in sys.modules:
        patch_serve()
    # An engine's process loads its plugins first of all, from EngineCore.__init__.
    if "vllm.v1.engine.core" in sys.modules:
        patch_engine()


def switch_on(engine_args: compat.EngineArgs, model_config: compat.ModelConfig) -> None:
    """Turn on vLLM's LoRA control plane, which deltas use, for a dqrelo engine."""
    if model_config.quantization != "dqrelo":
        return
    from vllm_dqrelo.options import DEFAULT_MAX_DELTAS, Options
    from vllm_dqrelo.quantization import refuse_dtype
    from vllm_dqrelo.worker.vocabulary import enlarge

    quantized = model_config.model_arch_config.quantization_config
    if quantized and current_platform.is_cpu():
        refuse_dtype(quantized, model_config.dtype)
    patch_engine()  # for an engine in this process
    compat.keep_compilation(is_dqrelo)
    compat_frontend.show_reasons()
    engine_args.enable_lora = True
    if engine_args.max_loras == 1:
        engine_args.max_loras = DEFAULT_MAX_DELTAS
    # additional_config is part of vLLM's compile cache key; the plugin must be too.
    options = Options.of(engine_args.additional_config)
    enlarge(model_config, options.added_tokens)
    engine_args.additional_config = {
        **engine_args.additional_config,
        "dqrelo": {**options.given, "version": __version__},
    }
    patch_frontend()


def is_dqrelo(vllm_config: compat.VllmConfig) -> bool:
    """Whether an engine has deltas."""
    model_config = vllm_config.model_config
    return model_config is not None and model_config.quantization == "dqrelo"


def patch_frontend() -> None:
    """Let deltas be named and be themselves in front of the engine. Safe to call again.

    Also for engines without deltas in this process, which go on as before.
    """
    from vllm_dqrelo.frontend.metrics import DeltaMetrics
    from vllm_dqrelo.frontend.models import DeltaModels, check_twin, serving_twin
    from vllm_dqrelo.frontend.offline import offline_twin
    from vllm_dqrelo.frontend.profiles import Frontends

    def complete(engine: Any) -> None:
        if is_dqrelo(engine.vllm_config):
            engine.frontends = Frontends(engine)
            engine.delta_metrics = DeltaMetrics.of(engine)

    def choose(vllm_config: compat.VllmConfig) -> type[DeltaModels] | None:
        return DeltaModels if is_dqrelo(vllm_config) else None

    compat_frontend.after_engine_init(complete)
    compat_frontend.choose_serving_models(choose)
    compat_frontend.choose_handler(serving_twin)
    compat_frontend.before_check_model(check_twin)
    compat_frontend.choose_offline(offline_twin)


def patch_serve() -> None:
    """Let ``vllm serve`` make room for its deltas, or end, before it starts."""

    def prepare(arguments: Any) -> None:
        from vllm_dqrelo.format.errors import DqreloError
        from vllm_dqrelo.frontend.start import make_room

        try:
            make_room(arguments)
        except (DqreloError, OSError, ValueError) as error:
            raise SystemExit(f"dqrelo: error: {error}") from error

    compat_frontend.before_serve(prepare)


def patch_engine() -> None:
    """Let an engine hold requests back until their deltas are in memory."""

    from vllm_dqrelo.engine import compat as engine_compat

    def start(core: Any) -> None:
        from vllm_dqrelo.engine.scheduler import start

        start(core)

    engine_compat.before_scheduler(start)


def patch_worker() -> None:
    """Put the delta manager in the place of LoRA's. Safe to call again."""
    from vllm_dqrelo.worker import compat as worker_compat
    from vllm_dqrelo.worker.calls import CALLS
    from vllm_dqrelo.worker.manager import DeltaManager

    def choose(vllm_config: compat.VllmConfig) -> type[DeltaManager] | None:
        return DeltaManager if is_dqrelo(vllm_config) else None

    worker_compat.choose_lora_manager(choose)
    for call in CALLS:
        worker_compat.add_worker_call(call)
