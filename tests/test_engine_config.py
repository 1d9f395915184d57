# SPDX-License-Identifier: Apache-2.0
"""An engine's configuration: what is switched on, warned of and refused."""

import json
import pickle
from contextlib import nullcontext
from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


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


@pytest.mark.parametrize(("given", "mixed"), [(1, 8), (2, 2), (9, 9)])
def test_one_is_the_default_of_vllm_and_never_of_a_user(given, mixed):
    """An EngineArgs with 1 may be one without ``max_loras``."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_dqrelo.options import max_deltas

    assert (EngineArgs.max_loras == given) == (given == 1)
    assert max_deltas(given) == mixed


def drafts(method, adaptive=False):
    """A configuration of speculative decoding."""
    return SimpleNamespace(method=method, enable_adaptive_verification=adaptive)


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("parallel_config", "world_size", 2, "not by context parallelism"),
        ("parallel_config", "decode_context_parallel_size", 2, "context parallelism"),
        (None, "speculative_config", drafts("mtp"), "not mtp, which was not"),
        (None, "speculative_config", drafts("ngram", True), "enable_adaptive_verif"),
        ("parallel_config", "use_ubatching", True, "dual-batch overlap"),
        (
            "parallel_config",
            "enable_batch_sharded_sampling",
            True,
            "--enable-batch-sharded-sampling",
        ),
        ("model_config", "is_encoder_decoder", True, "encoder-decoder"),
        ("model_config", "is_diffusion", True, "diffusion"),
        ("model_config", "runner_type", "pooling", "not --runner pooling"),
        ("model_config", "enable_sleep_mode", True, "--enable-sleep-mode"),
        (None, "weight_transfer_config", object(), "--weight-transfer-config"),
        ("cache_config", "kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
        ("offload_config.uva", "cpu_offload_gb", 1, "--cpu-offload-gb"),
        ("offload_config.prefetch", "offload_group_size", 2, "--offload-group-size"),
        ("model_config.hf_config", "head_dtype", "float16", "head_dtype torch.float16"),
    ],
)
def test_what_is_not_right_with_deltas_is_refused(
    monkeypatch, config, part, name, value, message
):
    import torch

    from vllm_dqrelo.worker.manager import DeltaManager

    owner = attrgetter(part)(config) if part else config
    DeltaManager(config, torch.device("cpu"))
    if isinstance(getattr(type(owner), name, None), property):
        monkeypatch.setattr(type(owner), name, property(lambda self: value))
    else:
        monkeypatch.setattr(owner, name, value, raising=name != "head_dtype")
    with pytest.raises(ValueError, match=message):
        DeltaManager(config, torch.device("cpu"))


@pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3"])
def test_a_draft_model_beside_added_tokens_is_refused(config, monkeypatch, method):
    """The draft model would look these tokens up beyond the end of its embedding."""
    from vllm_dqrelo.supported import refuse_unsupported

    monkeypatch.setattr(config, "speculative_config", drafts(method))
    refuse_unsupported(config, torch.device("cpu"))
    monkeypatch.setattr(config, "additional_config", {"dqrelo": {"added_tokens": 5}})
    with pytest.raises(ValueError, match="added tokens .added_tokens is 5., which the"):
        refuse_unsupported(config, torch.device("cpu"))
    monkeypatch.setattr(config, "speculative_config", drafts("ngram"))
    refuse_unsupported(config, torch.device("cpu"))


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_where_heads_are_refused(config, monkeypatch, method):
    from vllm_dqrelo.supported import refuse_unsupported

    model, parallel = config.model_config, config.parallel_config
    for owner, name, value, message in (
        (parallel, "pipeline_parallel_size", 2, f"{method} and --pipeline-parallel"),
        (type(model), "is_multimodal_model", True, f"{method} for text models only"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, value)
            refuse_unsupported(config, torch.device("cpu"))
            patched.setattr(config, "speculative_config", drafts(method))
            with pytest.raises(ValueError, match=message):
                refuse_unsupported(config, torch.device("cpu"))


def test_a_gpu_of_amd_is_refused(config, monkeypatch):
    """To torch its device is "cuda"."""
    from vllm_dqrelo.supported import refuse_unsupported

    def refused(device):
        try:
            refuse_unsupported(config, torch.device(device))
        except ValueError as error:
            return "AMD GPUs" in str(error)
        return False

    assert not refused("cuda")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert refused("cuda") and not refused("cpu")


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

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": amx})
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

    from vllm_dqrelo.worker.base_methods import under_deltas

    class Quantised(LinearMethodBase):
        create_weights = apply = None

    for layer, message in ((RoutedExperts, "experts"), (ParallelLMHead, "LM heads")):
        with pytest.raises(ValueError, match=f"does not serve quantised .*{message}"):
            under_deltas(layer.__new__(layer), Quantised())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"has_bias": True}, "with biases"),
        ({"apply_router_weight_on_input": True}, "that weight the experts' input"),
        ({"activation": "swigluoai"}, "with activation swigluoai, only silu, gelu, "),
        ({}, None),
    ],
)
def test_experts_that_deltas_cannot_be_put_on_are_refused(change, message):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from vllm_dqrelo.worker.experts import refuse

    given = {"has_bias": False, "apply_router_weight_on_input": False} | change
    given["activation"] = MoEActivation.from_str(change.get("activation", "silu"))
    layer = SimpleNamespace(**given, moe_config=SimpleNamespace(**given))
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        refuse(layer)


def test_an_architecture_that_nobody_tested_is_named(monkeypatch, config):
    from vllm_dqrelo import supported

    logged = []
    monkeypatch.setattr(supported.logger, "warning", lambda *args: logged.append(args))
    supported.warn_untested(config)
    assert not logged
    monkeypatch.setattr(supported, "TESTED_ARCHITECTURES", {"OtherForCausalLM"})
    supported.warn_untested(config)
    assert logged[0][1:] == ("LlamaForCausalLM", "OtherForCausalLM")


@pytest.mark.parametrize(
    ("name", "value"), [("enable_expert_parallel", True), ("data_parallel_size", 2)]
)
def test_experts_that_get_rows_of_other_workers_are_refused(
    monkeypatch, config, name, value
):
    import torch

    from vllm_dqrelo.worker.manager import DeltaManager

    monkeypatch.setattr(config.parallel_config, name, value)
    DeltaManager(config, torch.device("cpu"))  # without experts it is right
    monkeypatch.setattr(type(config.model_config), "is_moe", True)
    with pytest.raises(ValueError, match="--enable-expert-parallel or with --data-par"):
        DeltaManager(config, torch.device("cpu"))


def test_a_scheduler_of_another_kind_is_refused():
    from vllm_dqrelo.engine.compat import check_scheduler

    with pytest.raises(ValueError, match="--scheduler-cls"):
        check_scheduler(dict)


def test_another_device_is_refused(monkeypatch, config):
    import torch

    from vllm_dqrelo.worker.manager import DeltaManager

    DeltaManager(config, torch.device("cuda"))
    with pytest.raises(ValueError, match="on CPUs and on NVIDIA GPUs, not on xpu"):
        DeltaManager(config, torch.device("xpu"))
    monkeypatch.setattr(type(config.model_config), "is_moe", True)
    message = "graphs of mixtures of experts in bfloat16 only"
    with pytest.raises(ValueError, match=message):
        DeltaManager(config, torch.device("cuda"))
    config.model_config.enforce_eager = True
    DeltaManager(config, torch.device("cuda"))


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


@pytest.mark.parametrize(
    ("device", "graphs", "counts"),
    [("cpu", 512, [1]), ("cuda", 512, [1, 512, 8192]), ("cuda", None, [1, 8192])],
)
def test_steps_in_which_every_layer_must_be_met(device, graphs, counts):
    from vllm_dqrelo.worker.coverage import token_counts

    config = SimpleNamespace(
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=graphs),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192),
    )
    assert token_counts(config, torch.device(device)) == counts


def linear_site(plain=True, fully_sharded=False, vocabulary=False, rows=48):
    """A linear layer of [rows, 40], or the LM head."""
    gemm = SimpleNamespace(plain=plain)
    weight = torch.empty(rows, 40, dtype=torch.bfloat16)
    module = SimpleNamespace(quant_method=gemm, weight=weight)
    kind = {"is_vocabulary": vocabulary, "fully_sharded": fully_sharded}
    return SimpleNamespace(module=module, **kind)


@pytest.mark.parametrize(
    ("device", "graphs", "sites", "rows"),
    [
        ("cuda", 512, [linear_site(), linear_site(rows=64)], 768),
        ("cuda", 1000, [linear_site(), linear_site(rows=64)], 1001),
        (
            "cuda",
            None,
            [linear_site(rows=64), linear_site(False, vocabulary=True)],
            768,
        ),
        ("cuda", 512, [linear_site(), linear_site(plain=False)], None),
        ("cuda", 512, [linear_site(), linear_site(fully_sharded=True)], None),
        ("cpu", 512, [linear_site()], None),
    ],
)
def test_from_which_rows_on_matrices_are_merged(
    device, graphs, sites, rows, monkeypatch
):
    """All linear layers or none; and the memory for the largest."""
    from vllm_dqrelo.worker import compat, limits

    monkeypatch.setattr(compat, "multiplies_by_weight", lambda method: method.plain)
    compilation = SimpleNamespace(max_cudagraph_capture_size=graphs)
    config = SimpleNamespace(compilation_config=compilation)
    of_model = SimpleNamespace(by_name=dict(enumerate(sites)))
    assert limits.merge_rows(config, torch.device(device), of_model) == rows
    size = 64 * 40 * 2 + 64 * 2 if rows else 0  # a matrix, and a bias
    assert limits.whole_bytes(of_model, rows) == size
