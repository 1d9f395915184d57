# SPDX-License-Identifier: Apache-2.0
"""What the plugin does to a vLLM process, and when.

``register`` runs in every process of every vLLM in this environment, also in
those that never use a delta. It therefore only makes ``--quantization dqrelo``
known, and looks at an engine that starts. The rest waits until that option is
given: the control plane is switched on when the engine's configuration is made,
the engine gets its deltas and its scheduler when it has its KV cache, and a worker
is patched when its model is built (worker/base_methods.py).
"""

from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_dqrelo import __version__, compat
from vllm_dqrelo.engine import compat as engine_compat
from vllm_dqrelo.frontend import compat as frontend_compat
from vllm_dqrelo.options import Options, is_dqrelo, max_deltas
from vllm_dqrelo.supported import refuse_dtype

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
    if frontend_compat.is_serve():
        patch_serve()
    if engine_compat.is_engine():
        patch_engine()


def switch_on(engine_args: compat.EngineArgs, model_config: compat.ModelConfig) -> None:
    """Turn on vLLM's LoRA control plane, which deltas use, for a dqrelo engine."""
    if not is_dqrelo(model_config):
        return
    quantized = model_config.model_arch_config.quantization_config
    if quantized and current_platform.is_cpu():
        refuse_dtype(quantized, model_config.dtype)
    patch_engine()  # for an engine in this process
    compat.keep_compilation(lambda config: is_dqrelo(config.model_config))
    frontend_compat.show_reasons()
    engine_args.enable_lora = True
    engine_args.max_loras = max_deltas(engine_args.max_loras)
    # additional_config is part of vLLM's compile cache key; the plugin must be too.
    options = Options.of(engine_args.additional_config)
    enlarge(model_config, options.added_tokens)
    engine_args.additional_config = {
        **engine_args.additional_config,
        "dqrelo": {**options.given, "version": __version__},
    }
    patch_frontend()


def enlarge(model_config: compat.ModelConfig, added_tokens: int) -> None:
    """Let vLLM build the model with ``added_tokens`` rows more than the checkpoint."""
    model_config.hf_text_config.vocab_size += added_tokens
    model_config.model_arch_config.vocab_size += added_tokens


def patch_frontend() -> None:
    """Let deltas be named and be themselves in front of the engine. Safe to call again.

    Also for engines without deltas in this process, which go on as before.
    """
    from vllm_dqrelo.frontend.metrics import DeltaMetrics
    from vllm_dqrelo.frontend.models import DeltaModels, check_twin, serving_twin
    from vllm_dqrelo.frontend.offline import offline_twin
    from vllm_dqrelo.frontend.profiles import Profiles

    def complete(engine: Any) -> None:
        if is_dqrelo(engine.vllm_config.model_config):
            engine.profiles = Profiles(engine)
            engine.delta_metrics = DeltaMetrics.of(engine)

    def choose(vllm_config: compat.VllmConfig) -> type[DeltaModels] | None:
        return DeltaModels if is_dqrelo(vllm_config.model_config) else None

    frontend_compat.after_engine_init(complete)
    frontend_compat.choose_serving_models(choose)
    frontend_compat.choose_handler(serving_twin)
    frontend_compat.before_check_model(check_twin)
    frontend_compat.ask_each_template()
    frontend_compat.choose_offline(offline_twin)


def patch_serve() -> None:
    """Let ``vllm serve`` make room for its deltas, or end, before it starts."""

    def prepare(arguments: Any) -> None:
        from vllm_dqrelo.format.errors import DqreloError
        from vllm_dqrelo.frontend.start import make_room

        try:
            make_room(arguments)
        except (DqreloError, OSError, ValueError) as error:
            raise SystemExit(f"dqrelo: error: {error}") from error

    frontend_compat.before_serve(prepare)


def patch_engine() -> None:
    """Let an engine hold requests back until their deltas are in memory."""

    def start(core: Any) -> None:
        from vllm_dqrelo.engine.scheduler import start

        start(core)

    engine_compat.before_scheduler(start)
