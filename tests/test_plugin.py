# SPDX-License-Identifier: Apache-2.0
"""The hooks: what vLLM calls and what we patch, on the vLLM that is installed."""

import inspect
import json
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def test_the_manager_has_all_that_vllm_calls():
    """Every use of the LoRA manager in vLLM's workers, found in their source."""
    import vllm.v1.worker
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    from vllm_dqrelo.manager import DeltaManager

    used = set()
    for folder in vllm.v1.worker.__path__:
        for path in __import__("pathlib").Path(folder).rglob("*.py"):
            used |= set(re.findall(r"lora_manager\.(\w+)", path.read_text()))
    assert {"set_active_adapters", "add_adapter", "remove_all_adapters"} <= used
    missing = {name for name in used if not hasattr(DeltaManager, name)}
    assert not missing, f"vLLM calls {missing} of its LoRA manager"
    for name in sorted(used):
        stock = getattr(LRUCacheWorkerLoRAManager, name)
        if callable(stock):
            theirs = inspect.signature(stock).parameters
            ours = inspect.signature(getattr(DeltaManager, name)).parameters
            assert len(ours) == len(theirs), name


def test_the_contract_test_can_fail(monkeypatch):
    from vllm_dqrelo.manager import DeltaManager

    monkeypatch.delattr(DeltaManager, "pin_adapter")
    with pytest.raises(AssertionError, match="pin_adapter"):
        test_the_manager_has_all_that_vllm_calls()


def test_what_is_logged_is_in_vllm_s_log():
    """vLLM gives a handler and a level to the loggers below its own name."""
    import importlib
    import pkgutil

    import vllm_dqrelo

    loggers = []
    for module in pkgutil.iter_modules(vllm_dqrelo.__path__, "vllm_dqrelo."):
        if logger := getattr(importlib.import_module(module.name), "logger", None):
            loggers.append(logger.name)
    assert len(loggers) > 5
    assert all(name.startswith("vllm.") for name in loggers), loggers


def test_register_twice_and_the_method_is_known():
    import vllm_dqrelo
    from vllm_dqrelo.quantization import DqreloConfig

    vllm_dqrelo.register()
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_model_config
    vllm_dqrelo.register()
    assert EngineArgs.create_model_config is create
    from vllm.model_executor.layers.quantization import get_quantization_config

    assert get_quantization_config("dqrelo") is DqreloConfig


@pytest.mark.parametrize("version", ["0.30.2", "0.33.0", "1.0.0rc1"])
def test_vllm_outside_the_tested_range(monkeypatch, caplog, version):
    from vllm.model_executor.layers import quantization

    from vllm_dqrelo import plugin
    from vllm_dqrelo.format.errors import DqreloError
    from vllm_dqrelo.serve import check_plugin

    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(quantization, "QUANTIZATION_METHODS", [])
    logged = []
    monkeypatch.setattr(plugin.logger, "error", lambda *args: logged.append(args))
    plugin.register()
    assert quantization.QUANTIZATION_METHODS == []
    assert f"tested with vLLM >=0.31,<0.33, this is {version}" in str(logged)
    with pytest.raises(DqreloError, match="tested with vLLM >=0.31,<0.33"):
        check_plugin()


def test_every_route_of_a_delta_s_own_is_there_or_named(monkeypatch):
    from vllm_dqrelo import compat_frontend, models, plugin

    plugin.patch_frontend()  # finds all of them
    gone = {"serve.tokenize.serving.ServingTokenization": ["create_nothing"]}
    monkeypatch.setattr(compat_frontend, "SERVING_METHODS", gone)
    with pytest.raises(RuntimeError, match="ServingTokenization.create_nothing"):
        compat_frontend.choose_handler(models.serving_twin)


def test_endpoints_are_added_to_the_plugins_that_would_be_loaded(monkeypatch):
    from vllm_dqrelo.serve import plugins_with_endpoints

    monkeypatch.setenv("VLLM_PLUGINS", "dqrelo,other")
    assert plugins_with_endpoints() == ["dqrelo", "other", "dqrelo_endpoints"]
    monkeypatch.delenv("VLLM_PLUGINS")
    assert {"dqrelo", "dqrelo_endpoints"} <= set(plugins_with_endpoints())


def test_a_hook_that_is_gone_is_named():
    from vllm_dqrelo.compat import find

    with pytest.raises(RuntimeError, match="has no math.pie, which vllm-dqrelo needs"):
        find(__import__("math"), "pie")


def test_plugin_not_installed_or_not_allowed(monkeypatch):
    from importlib import metadata

    from vllm_dqrelo.format.errors import DqreloError
    from vllm_dqrelo.serve import check_plugin

    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(DqreloError, match="VLLM_PLUGINS=other"):
        check_plugin()
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr(metadata, "entry_points", lambda **_: [])
    with pytest.raises(DqreloError, match="vllm-dqrelo is not installed"):
        check_plugin()


def test_without_vllm_serve_says_what_to_install(monkeypatch):
    from vllm_dqrelo.format.errors import DqreloError
    from vllm_dqrelo.serve import check_plugin

    monkeypatch.delitem(sys.modules, "vllm_dqrelo.compat", raising=False)
    monkeypatch.delattr(__import__("vllm_dqrelo"), "compat", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(DqreloError, match=r'pip install "vllm-dqrelo\[vllm\]"'):
        check_plugin()


@pytest.fixture
def config(family):
    """The configuration of a dqrelo engine, made as vLLM makes it."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(family("llama").base), quantization="dqrelo", skip_tokenizer_init=True
    ).create_engine_config()


def test_the_option_alone_switches_the_control_plane_on(config):
    from vllm_dqrelo import __version__

    assert config.lora_config.max_loras == 8
    assert config.additional_config == {"dqrelo": {"version": __version__}}


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("parallel_config", "world_size", 2, "not by pipeline or context parallelism"),
        ("parallel_config", "decode_context_parallel_size", 2, "context parallelism"),
        (None, "speculative_config", SimpleNamespace(method="eagle"), "not eagle"),
        ("parallel_config", "use_ubatching", True, "dual-batch overlap"),
        (
            "parallel_config",
            "enable_batch_sharded_sampling",
            True,
            "--enable-batch-sharded-sampling",
        ),
        ("model_config", "supports_multimodal_inputs", True, "images or sound"),
        ("model_config", "is_encoder_decoder", True, "encoder-decoder"),
        ("model_config", "is_diffusion", True, "diffusion"),
        ("model_config", "enable_prompt_embeds", True, "--enable-prompt-embeds"),
        ("model_config", "enable_sleep_mode", True, "--enable-sleep-mode"),
        (None, "weight_transfer_config", object(), "--weight-transfer-config"),
    ],
)
def test_what_is_not_right_with_deltas_is_refused(
    monkeypatch, config, part, name, value, message
):
    import torch

    from vllm_dqrelo.manager import DeltaManager

    owner = getattr(config, part) if part else config
    if isinstance(getattr(type(owner), name, None), property):
        monkeypatch.setattr(type(owner), name, property(lambda self: value))
    else:
        monkeypatch.setattr(owner, name, value)
    with pytest.raises(ValueError, match=message):
        DeltaManager(config, torch.device("cpu"))


def test_a_mixture_of_experts_is_not_compiled(config, tmp_path):
    """Whose rows are sorted by what the router chose."""
    from transformers import Qwen3MoeConfig
    from vllm.config import CompilationMode
    from vllm.engine.arg_utils import EngineArgs

    assert config.compilation_config.mode != CompilationMode.NONE
    Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"]).save_pretrained(tmp_path)
    options = {"quantization": "dqrelo", "skip_tokenizer_init": True}
    mixture = EngineArgs(str(tmp_path), **options).create_engine_config()
    assert mixture.compilation_config.mode == CompilationMode.NONE


def compressed(bits, type_, inputs):
    """The quantization_config of a checkpoint of compressed-tensors."""
    one = {"num_bits": bits, "type": type_, "strategy": "channel", "symmetric": True}
    two = one | {"strategy": "token", "dynamic": True} if inputs else None
    packed = type_ == "int" and not inputs
    group = {"targets": ["Linear"], "weights": one, "input_activations": two}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if packed else f"{type_}-quantized",
        "config_groups": {"group_0": group},
    }


W4A16, W8A8 = compressed(4, "int", False), compressed(8, "int", True)
FP8 = compressed(8, "float", True)


@pytest.fixture
def quantised(family, tmp_path):
    """``quantised(settings, dtype)``: the configuration of an engine on such a base."""
    from vllm.engine.arg_utils import EngineArgs

    def make(settings, dtype):
        config = json.loads((family("llama").base / "config.json").read_text())
        config["quantization_config"] = settings
        (tmp_path / "config.json").write_text(json.dumps(config))
        options = {"quantization": "dqrelo", "skip_tokenizer_init": True}
        return EngineArgs(str(tmp_path), dtype=dtype, **options).create_engine_config()

    return make


@pytest.mark.parametrize(
    ("settings", "dtype", "amx", "right"),
    [
        (W8A8, "float16", True, "bfloat16"),
        (W8A8, "float32", True, "bfloat16"),
        (W8A8, "float32", False, None),
        (W4A16, "float32", False, "bfloat16 or float16"),
        (W4A16, "float16", True, None),
        (FP8, "float32", True, None),
    ],
)
def test_what_kernels_of_the_base_cannot_compute_is_refused(
    settings, dtype, amx, right, quantised, monkeypatch
):
    import torch

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    if right is None:
        quantised(settings, dtype)
        return
    message = f"-quantized do not compute in torch.{dtype}: give --dtype {right}$"
    with pytest.raises(ValueError, match=message):
        quantised(settings, dtype)


def test_the_configuration_of_a_quantised_base_travels_to_a_worker(quantised):
    from vllm_dqrelo.quantization import UnderDeltas

    sent = quantised(W4A16, "bfloat16").quant_config
    got = pickle.loads(pickle.dumps(sent))
    assert isinstance(got, UnderDeltas) and isinstance(got, type(sent).__bases__[1])
    assert repr(vars(got)) == repr(vars(sent))


def test_layers_that_deltas_cannot_be_put_on_are_refused():
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.linear import LinearMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    from vllm_dqrelo.quantization import under_deltas

    class Quantised(LinearMethodBase):
        create_weights = apply = None

    for layer, message in ((RoutedExperts, "experts"), (ParallelLMHead, "LM heads")):
        with pytest.raises(ValueError, match=f"has no quantised .*{message}"):
            under_deltas(layer.__new__(layer), Quantised())


def test_an_architecture_that_nobody_tested_is_named(monkeypatch, config):
    from vllm_dqrelo import options

    logged = []
    monkeypatch.setattr(options.logger, "warning", lambda *args: logged.append(args))
    options.warn_untested(config)
    assert not logged
    monkeypatch.setattr(options, "TESTED_ARCHITECTURES", {"OtherForCausalLM"})
    options.warn_untested(config)
    assert logged[0][1:] == ("LlamaForCausalLM", "OtherForCausalLM")


@pytest.mark.parametrize(
    ("name", "value"), [("enable_expert_parallel", True), ("data_parallel_size", 2)]
)
def test_experts_that_get_rows_of_other_workers_are_refused(
    monkeypatch, config, name, value
):
    import torch

    from vllm_dqrelo.manager import DeltaManager

    monkeypatch.setattr(config.parallel_config, name, value)
    DeltaManager(config, torch.device("cpu"))  # without experts it is right
    monkeypatch.setattr(type(config.model_config), "is_moe", True)
    with pytest.raises(ValueError, match="--enable-expert-parallel or with --data-par"):
        DeltaManager(config, torch.device("cpu"))


def test_a_scheduler_of_another_kind_is_refused():
    from vllm_dqrelo.compat import check_scheduler

    with pytest.raises(ValueError, match="--scheduler-cls"):
        check_scheduler(dict)


def test_a_gpu_is_refused_until_it_was_tested(monkeypatch, config):
    import torch

    from vllm_dqrelo.manager import DeltaManager

    with pytest.raises(ValueError, match="runs on the CPU only so far, not on cuda"):
        DeltaManager(config, torch.device("cuda"))
    monkeypatch.setattr(type(config.model_config), "is_moe", True)
    with pytest.raises(ValueError, match="it has mixtures of experts on the CPU only"):
        DeltaManager(config, torch.device("cuda"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--delta", "math=/nowhere"], "no delta_config.json"),
        (["--delta", "/nowhere"], "expected NAME=DELTA"),
        (["--delta-dir", "/nowhere"], "/nowhere is no folder"),
    ],
)
def test_serve_ends_before_vllm_starts(family, arguments, message):
    command = [sys.executable, "-m", "dqrelo_tools.cli", "serve"]
    made = family("llama")
    done = subprocess.run(
        [*command, str(made.base), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_serve_refuses_another_base_and_a_name_twice(family, capsys):
    from dqrelo_tools import cli

    made = family("llama")
    delta = f"math={made.deltas[0]}"
    assert cli.main(["serve", str(made.models[1]), "--delta", delta]) == 1
    assert "belongs to another base" in capsys.readouterr().err
    assert cli.main(["serve", str(made.base), "--delta", delta, "--delta", delta]) == 1
    assert "math is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "compiled"),
    [
        ({"quantization": "dqrelo"}, True),
        ({"quantization": "dqrelo", "enforce_eager": True}, False),
        ({"enable_lora": True}, False),  # vLLM's own adapters, as before
    ],
    ids=str,
)
def test_what_is_compiled_on_the_cpu(family, options, compiled):
    from vllm.config import CompilationMode
    from vllm.engine.arg_utils import EngineArgs

    options |= {"dtype": "float32", "skip_tokenizer_init": True}
    arguments = EngineArgs(str(family("llama").base), **options)
    config = arguments.create_engine_config()
    assert (config.compilation_config.mode != CompilationMode.NONE) is compiled
    assert config.lora_config is not None


def test_experts_are_not_compiled(save_model, tmp_path):
    from transformers import MixtralConfig
    from vllm.config import CompilationMode
    from vllm.engine.arg_utils import EngineArgs

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    base = save_model(config, tmp_path, 0)
    options = {"dtype": "float32", "skip_tokenizer_init": True}
    arguments = EngineArgs(str(base), quantization="dqrelo", **options)
    mode = arguments.create_engine_config().compilation_config.mode
    assert mode == CompilationMode.NONE
