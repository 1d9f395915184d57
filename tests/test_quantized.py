# SPDX-License-Identifier: Apache-2.0
"""Deltas on bases that are quantised: what they stand for, and what vLLM computes."""

import gc
import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import run
from support.shapes import SHAPE, UNTIED
from transformers import AutoModelForCausalLM, LlamaConfig

from dqrelo_tools import fidelity
from dqrelo_tools.export import export
from vllm_dqrelo.format.checkpoint import Checkpoint
from vllm_dqrelo.format.delta import Delta

GROUP = 32
# Whole groups and words.
WIDER = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
CONFIG = LlamaConfig(**SHAPE | WIDER, **UNTIED)


def words(values, order=range(8)):
    """Eight numbers of four bits a word along the last dimension, the lowest first."""
    parts = values.long().unflatten(-1, (-1, 8))
    packed = sum(parts[..., c] << 4 * place for place, c in enumerate(order))
    return packed.to(torch.int32)


def by_group(weight, low, high):
    """Integers from ``low`` to ``high``; scales and zero points of each group."""
    groups = weight.unflatten(1, (-1, GROUP))
    least, most = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = ((most - least) / (high - low)).half().float()
    zero = (low - least / scale).round().clamp(low, high)
    q = (groups / scale[..., None] + zero[..., None]).round().clamp(low, high)
    return q.flatten(1), scale, zero


def compressed(weight, name):
    """Four bits, symmetric."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1) / 7
    q = (groups / scale[..., None]).round().clamp(-8, 7)
    dense = (q * scale[..., None]).flatten(1)
    return dense, {
        f"{name}_packed": words(q.flatten(1) + 8),
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor(weight.shape),
    }


def int8(weight, name):
    scale = weight.abs().amax(1, keepdim=True) / 127
    q = (weight / scale).round()
    return q * scale, {name: q.to(torch.int8), f"{name}_scale": scale}


def fp8(weight, name):
    scale = weight.abs().amax(1, keepdim=True) / 448
    q = (weight / scale).to(torch.float8_e4m3fn)
    return q.float() * scale, {name: q, f"{name}_scale": scale}


def fp8_tensor(weight, name):
    scale = weight.abs().max() / 448
    q = (weight / scale).to(torch.float8_e4m3fn)
    return q.float() * scale, {name: q, f"{name}_scale": scale}


def fp8_block(weight, name):
    n, k = (-(-size // 128) * 128 for size in weight.shape)
    padded = torch.zeros(n, k)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scale = blocks.abs().amax((1, 3)) / 448
    q = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    dense = (q.float() * scale[:, None, :, None]).reshape(n, k)
    rows, columns = map(slice, weight.shape)
    q = q.reshape(n, k)[rows, columns].contiguous()
    return dense[rows, columns], {name: q, f"{name}_scale_inv": scale}


def gptq(weight, name):
    q, scale, _ = by_group(weight, 0, 15)
    groups = weight.unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1) / 7).half().float()
    q = ((groups / scale[..., None]).round() + 8).clamp(0, 15)
    dense = ((q - 8) * scale[..., None]).flatten(1)
    module = name.removesuffix(".weight")
    return dense, {
        f"{module}.qweight": words(q.flatten(1)).T.contiguous(),
        f"{module}.qzeros": words(torch.full_like(scale.T, 7).contiguous()),
        f"{module}.scales": scale.T.contiguous(),
        f"{module}.g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }


def awq(weight, name):
    q, scale, zero = by_group(weight, 0, 15)
    dense = (q.unflatten(1, (-1, GROUP)) - zero[..., None]) * scale[..., None]
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    module = name.removesuffix(".weight")
    return dense.flatten(1), {
        f"{module}.qweight": words(q.T.contiguous(), order),
        f"{module}.qzeros": words(zero.T.contiguous(), order),
        f"{module}.scales": scale.T.contiguous(),
    }


def compressed_tensors(format_, weights, inputs=None):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def arguments(bits, type_, strategy, dynamic=False, **more):
    return {
        "num_bits": bits,
        "type": type_,
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
        **more,
    }


FORMATS = {
    "w4a16": (
        compressed,
        compressed_tensors(
            "pack-quantized", arguments(4, "int", "group", group_size=GROUP)
        ),
    ),
    "w8a8": (
        int8,
        compressed_tensors(
            "int-quantized",
            arguments(8, "int", "channel"),
            arguments(8, "int", "token", True),
        ),
    ),
    "w8a8-fp8": (
        fp8,
        compressed_tensors(
            "float-quantized",
            arguments(8, "float", "channel"),
            arguments(8, "float", "token", True),
        ),
    ),
    "fp8": (fp8_tensor, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "fp8-block": (
        fp8_block,
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    ),
    "gptq": (
        gptq,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        },
    ),
    "awq": (
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
    ),
}


SERVED = ["w4a16", "w8a8-fp8", "w8a8", "fp8-block", "gptq", "awq"]  # by vLLM's CPU


def quantize(folder, output, kind):
    """A quantised copy of a model; what its matrices stand for."""
    shutil.copytree(folder, output)
    how, config = FORMATS[kind]
    dense, stored = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "_proj" in name:
            dense[name], parts = how(tensor.float(), name)
            stored |= {key: part.clone() for key, part in parts.items()}
        else:
            stored[name] = tensor
    save_file(stored, output / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((output / "config.json").read_text())
    settings["quantization_config"] = config
    (output / "config.json").write_text(json.dumps(settings))
    return dense


@pytest.mark.parametrize("kind", FORMATS)
def test_what_a_quantised_matrix_stands_for(kind, save_model, tmp_path):
    base = save_model(CONFIG, tmp_path / "base", 1)
    dense = quantize(base, tmp_path / "quantised", kind)
    plain, checkpoint = Checkpoint(base), Checkpoint(tmp_path / "quantised")
    assert [*checkpoint] == [*plain]
    for name in plain:
        assert checkpoint.spec(name) == plain.spec(name)
        expected = dense.get(name, plain.get(name))
        torch.testing.assert_close(checkpoint.get(name), expected)
        (row,) = checkpoint.rows(name, [3])
        assert torch.equal(row, checkpoint.get(name)[3:4])
    for name, matrix in dense.items():  # it is the model, but not exactly
        error = (matrix - plain.get(name)).norm() / plain.get(name).norm()
        assert 1e-4 < error < 0.2
    assert checkpoint.fingerprint() != plain.fingerprint()


@pytest.fixture
def models(save_model, tmp_path):
    """``models(kind)``: a base, its quantised copy, two deltas on that."""

    def make(kind):
        base, quantised = save_model(CONFIG, tmp_path / "base", 1), tmp_path / kind
        quantize(base, quantised, kind)
        deltas = [tmp_path / f"delta-{i}" for i in range(2)]
        for i, delta in enumerate(deltas):
            model = save_model(CONFIG, tmp_path / f"model-{i}", 2 + i)
            options = ("--base", base, "--base-quantized", quantised, "--ratio", "0.25")
            assert run("convert", *options, "--model", model, "--output", delta) == 0
        return base, quantised, deltas

    return make


def test_a_copy_without_what_is_not_a_parameter(models, tmp_path):
    """A quantiser leaves out buffers and layers for further tokens, and a wrapper."""
    base, quantised, (delta, _) = models("w4a16")
    path = base / "model.safetensors"
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in load_file(path).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    tensors["mtp.norm.weight"] = torch.ones(8)
    save_file(tensors, path, metadata={"format": "pt"})
    options = ["--base", base, "--base-quantized", quantised, "--ratio", "0.25"]
    options += ["--model", tmp_path / "model-0", "--output", tmp_path / "again"]
    assert run("convert", *options) == 0
    assert Delta(tmp_path / "again").config.digest == Delta(delta).config.digest


def test_a_delta_is_of_the_base_that_it_is_served_with(models, tmp_path, capsys):
    """And repairs its error: base + delta is as near to the fine-tune as ever."""
    base, quantised, (delta, _) = models("w4a16")
    model, merged = tmp_path / "model-0", tmp_path / "merged"
    other, plain = tmp_path / "other", tmp_path / "plain"
    options = ("--base", base, "--model", model, "--ratio", "0.25", "--output", other)
    assert run("convert", *options) == 0
    assert run("verify", "--base", quantised, "--delta", delta, "--model", model) == 0
    for wrong in ((base, delta), (quantised, other)):
        capsys.readouterr()
        assert run("verify", "--base", wrong[0], "--delta", wrong[1]) == 1
        assert "belongs to another base" in capsys.readouterr().err
    export(str(quantised), delta, merged)
    export(str(base), other, plain)
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    read, want = Checkpoint(quantised), load_file(model / "model.safetensors")
    got, kept = (load_file(f / "model.safetensors") for f in (merged, plain))
    for name in (name for name in read if "_proj" in name):
        error = (got[name] - want[name]).norm()
        # What the delta of the 16-bit base would leave here.
        loss = read.get(name) - load_file(base / "model.safetensors")[name]
        assert error < 0.95 * (kept[name] + loss - want[name]).norm()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"quantization_config": None}, "is not quantised: give it as --base"),
        ({"rms_norm_eps": 1.0}, "rms_norm_eps is 1.0"),
        ({"quantization_config": {"quant_method": "new"}}, "quantised by new cannot"),
    ],
)
def test_what_is_no_quantised_copy_is_refused(
    change, message, save_model, tmp_path, capsys
):
    base, quantised = save_model(CONFIG, tmp_path / "base", 1), tmp_path / "quantised"
    quantize(base, quantised, "w8a8")
    settings = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(settings | change))
    options = ("--base", base, "--base-quantized", quantised, "--model", base)
    assert run("convert", *options, "--output", tmp_path / "delta") == 1
    assert message in capsys.readouterr().err


def test_the_fingerprint_as_documented(save_model, tmp_path):
    """The fingerprint of the stored tensors, written after docs/format.md."""
    base, quantised = save_model(CONFIG, tmp_path / "base", 1), tmp_path / "quantised"
    quantize(base, quantised, "w4a16")
    config = json.loads((quantised / "config.json").read_text())["quantization_config"]
    text = json.dumps(config, sort_keys=True).encode() + b"\n"
    stored = load_file(quantised / "model.safetensors")
    names = {torch.float32: "F32", torch.int32: "I32", torch.int64: "I64"}
    for name in sorted(stored):
        tensor = stored[name]
        line = [name, names[tensor.dtype], list(tensor.shape)]
        text += json.dumps(line).encode() + b"\n"
        for row in sorted({i * (len(tensor) - 1) // 7 for i in range(8)}):
            text += tensor[row].numpy().tobytes()
    expected = f"sha256:{hashlib.sha256(text).hexdigest()}"
    assert Checkpoint(quantised).fingerprint() == expected


def logprobs(model, prompts):
    """Logprobs of the tokens of each prompt but the first, one after another."""
    found = []
    for prompt in map(torch.tensor, prompts):
        with torch.no_grad():
            scores = model(prompt[None]).logits[0, :-1].log_softmax(-1)
        found.append(scores.gather(1, prompt[1:, None])[:, 0])
    return torch.cat(found)


def rms(difference):
    return float(difference.square().mean().sqrt())


SHARDED = pytest.param("w4a16 -tp 2", marks=pytest.mark.slow)
ON_V2 = [pytest.param(kind, marks=pytest.mark.v2) for kind in SERVED[:2]]


@pytest.mark.vllm
@pytest.mark.parametrize("kind", [*ON_V2, *SERVED[2:], SHARDED])
def test_a_mixed_batch_on_a_quantised_base(
    kind, models, tmp_path, prompts, load, monkeypatch
):
    """Against transformers, in float32, with what the base's weights stand for."""
    if kind == "fp8-block" and not torch.cpu.get_capabilities().get("amx_tile"):
        pytest.skip("vLLM's block-scaled matrices need a CPU with AMX")
    vllm = pytest.importorskip("vllm")
    from vllm.distributed import cleanup_dist_env_and_memory

    kind, *workers = kind.split(" -tp ")
    _, quantised, deltas = models(kind)
    expected = [logprobs(fidelity.load(quantised), prompts)]
    for i, delta in enumerate(deltas):
        export(str(quantised), delta, tmp_path / f"merged-{i}")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged-{i}")
        expected.append(logprobs(model.float(), prompts))
    for i, one in enumerate(expected):
        for other in expected[:i]:
            assert rms(one - other) > 0.1
    cleanup_dist_env_and_memory()  # vLLM remembers the variable
    if workers:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")
    llm = vllm.LLM(
        str(quantised),
        tensor_parallel_size=2 if workers else 1,
        quantization="dqrelo",
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=128,
        max_num_seqs=16,
        additional_config={"dqrelo": {"delta_memory_gib": 0.001}},
    )
    requests = [None] + [load(llm, folder.name, folder) for folder in deltas]
    order = [(m, p) for m in range(3) for p in range(len(prompts))]
    outputs = llm.generate(
        [{"prompt_token_ids": prompts[p]} for _, p in order],
        vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
        lora_request=[requests[m] for m, _ in order],
        use_tqdm=False,
    )
    got = [[], [], []]
    for (m, p), output in zip(order, outputs, strict=True):
        steps = zip(prompts[p][1:], output.prompt_logprobs[1:], strict=True)
        got[m] += [step[token].logprob for token, step in steps]
    # Activations have 8 significant bits, through two layers; in fp8 they have 4.
    tolerance = 0.03 if kind == "w8a8-fp8" else 0.01
    for m, want in enumerate(expected):
        assert rms(torch.tensor(got[m]) - want) <= tolerance, m
    del llm
    gc.collect()
