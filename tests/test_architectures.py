# SPDX-License-Identifier: Apache-2.0
"""Each architecture: one mixed batch against transformers running each checkpoint."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engines import free
from support.shapes import GROUPED, SHAPE, TIED, UNTIED
from torch.nn.functional import silu
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3TextConfig,
    GPTNeoXConfig,
    Idefics3Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from dqrelo_kernels.rows import BASE
from dqrelo_tools.convert import convert
from dqrelo_tools.export import export
from vllm_dqrelo.format.checkpoint import Checkpoint
from vllm_dqrelo.worker import compat

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

# fp32 sums of up to 320 terms in another order, through two layers.
TOLERANCE = 1e-4
PROMPTS = [[1, 5, 9, 33, 200, 77, 3, 8], [4, 4, 100, 300, 2], [7] * 20 + [11, 12]]

# What the others have and Llama has not.
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GROUPED, **UNTIED),
    "mistral": MistralConfig(**GROUPED, **UNTIED, sliding_window=None),
    # attention to the last 8 tokens
    "mistral-window": MistralConfig(**GROUPED, **UNTIED, sliding_window=8),
    # biases of q, k and v
    "qwen2": Qwen2Config(**GROUPED, **TIED),
    # a norm of each head of q and k
    "qwen3": Qwen3Config(**GROUPED, **UNTIED),
    # norms multiply by 1 + weight, the embedding is scaled, windows in some layers
    "gemma3": Gemma3TextConfig(**GROUPED, **TIED, sliding_window=8),
    # q/k/v and gate/up are one matrix each in the checkpoint
    "phi3": Phi3Config(**SHAPE, **UNTIED, num_key_value_heads=1),
    # LayerNorm, biases everywhere, also of the LM head; a part of each head rotates
    "phi": PhiConfig(**SHAPE, **UNTIED, partial_rotary_factor=0.5),
    # q, k and v of each head side by side in one matrix
    "gpt-neox": GPTNeoXConfig(**SHAPE, **UNTIED),
    # experts: one of four chosen, and two of three
    "qwen3-moe": Qwen3MoeConfig(
        **GROUPED,
        **UNTIED,
        moe_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=1,
    ),
    "mixtral": MixtralConfig(**GROUPED, **UNTIED, num_local_experts=3),
    # and one that every token goes through
    "qwen2-moe": Qwen2MoeConfig(
        **GROUPED,
        **UNTIED,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=72,
        num_experts=5,
        num_experts_per_tok=2,
    ),
    # position embeddings are learnt
    "opt": OPTConfig(**SHAPE, **TIED, ffn_dim=200, word_embed_proj_dim=96),
}


# Another one has what these have: llama, gemma3, qwen2-moe and qwen3-moe.
SLOW = {"mistral", "mistral-window", "qwen2", "qwen3"}


def some_slow(kinds):
    """The kinds, those of SLOW marked so."""
    slow = pytest.mark.slow
    return [pytest.param(kind, marks=[slow] * (kind in SLOW)) for kind in kinds]


@pytest.fixture(autouse=True)
def free_engines():
    from vllm.distributed import cleanup_dist_env_and_memory

    yield
    free()
    cleanup_dist_env_and_memory()  # of a mixture of experts there are more groups


def alone(folder, model_class):
    """Each prompt with its greedy continuation, and the logprobs of all but the first.

    In transformers, and before vLLM starts: it decorates the classes that it uses.
    """
    model = model_class.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt in PROMPTS:
        with torch.no_grad():
            made = torch.tensor([prompt])
            for _ in range(8):
                scores = model(made).logits.log_softmax(-1)
                made = torch.cat([made, scores[:, -1:].argmax(-1)], dim=1)
        chosen = scores[0].gather(1, made[0, 1:, None])[:, 0]
        found.append((made[0].tolist(), chosen))
    return found


def batch(llm, prompts, requests):
    """The same of vLLM, for all prompts in one batch."""
    sampling = vllm.SamplingParams(
        max_tokens=8, temperature=0, logprobs=0, prompt_logprobs=0, detokenize=False
    )
    found = []
    for output in llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        sampling,
        lora_request=requests,
        use_tqdm=False,
    ):
        (completion,) = output.outputs
        tokens = [*output.prompt_token_ids, *completion.token_ids]
        steps = [*output.prompt_logprobs[1:], *completion.logprobs]
        pairs = zip(tokens[1:], steps, strict=True)
        chosen = torch.tensor([step[token].logprob for token, step in pairs])
        found.append((tokens, chosen))
    return found


def engine(base, dtype="float32", self_check="never", **options):
    room = {"delta_memory_gib": 0.001, "self_check": self_check}
    return vllm.LLM(
        str(base),
        quantization="dqrelo",
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=128,
        max_num_seqs=16,
        additional_config={"dqrelo": room},
        **{"enforce_eager": True, **options},
    )


def check_mixed_batch(base, tuned, folder, model_class=AutoModelForCausalLM, **options):
    """The base and the deltas of ``tuned`` in one batch; returns the engine."""
    from vllm_dqrelo import load_delta

    models, deltas = [base], []
    for i, model in enumerate(tuned):
        deltas.append(folder / f"delta-{i}")
        models.append(folder / f"merged-{i}")
        convert(str(base), str(model), deltas[i], 0.25)
        export(str(base), deltas[i], models[-1])
    expected = [alone(model, model_class) for model in models]
    # The test can fail: the models differ by far more than the tolerance.
    for one, other in itertools.combinations(expected, 2):
        for prompt, (_, scores), (_, others) in zip(PROMPTS, one, other, strict=True):
            same = slice(len(prompt) - 1)
            assert (scores[same] - others[same]).abs().max() > 10 * TOLERANCE

    llm = engine(base, **options)
    requests = [None]
    requests += [load_delta(llm, delta.name, str(delta)) for delta in deltas]
    order = [(p, m) for p in range(len(PROMPTS)) for m in range(len(models))]
    got = batch(llm, [PROMPTS[p] for p, _ in order], [requests[m] for _, m in order])
    for (p, m), (tokens, scores) in zip(order, got, strict=True):
        assert tokens == expected[m][p][0], (p, m)
        assert (scores - expected[m][p][1]).abs().max() <= TOLERANCE, (p, m)
    return llm


@pytest.mark.parametrize("kind", some_slow(ARCHITECTURES))
def test_mixed_batch_equals_each_model_alone(kind, save_model, tmp_path):
    base, *tuned = (
        save_model(ARCHITECTURES[kind], tmp_path / f"model-{seed}", seed)
        for seed in (1, 2, 3)
    )
    check_mixed_batch(base, tuned, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_engine_that_checks_itself_starts(kind, save_model, tmp_path):
    engine(save_model(ARCHITECTURES[kind], tmp_path, seed=1), self_check="always")


@pytest.mark.slow
def test_experts_as_on_a_gpu(save_model, tmp_path, monkeypatch):
    """Weights as in the checkpoint, and compiled, as vLLM does by default."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import (
        CPUUnquantizedExperts,
    )
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import (
        SharedExperts,
        SharedExpertsOrder,
    )
    from vllm.platforms.cpu import CpuPlatform

    def densely(self, output, hidden_states, w1, w2, topk_weights, topk_ids, **_):
        gate, up = torch.einsum("mk,enk->emn", hidden_states, w1).chunk(2, dim=-1)
        every = torch.einsum("emn,ekn->emk", silu(gate) * up, w2)
        shares = topk_weights.new_zeros(len(output), len(w2))
        shares = shares.scatter(1, topk_ids.long(), topk_weights)
        output.copy_(torch.einsum("emk,me->mk", every, shares))

    stored = CPUUnquantizedExperts, "process_weights_after_loading"
    monkeypatch.setattr(*stored, lambda self, layer: None)
    monkeypatch.setattr(CPUUnquantizedExperts, "apply", densely)
    monkeypatch.setattr(compat, "packing_of_experts", lambda layer: None)
    base, tuned = (
        save_model(ARCHITECTURES["qwen2-moe"], tmp_path / f"model-{seed}", seed)
        for seed in (1, 2)
    )
    llm = check_mixed_batch(base, [tuned], tmp_path, enforce_eager=False)
    mode = llm.llm_engine.vllm_config.compilation_config.mode
    assert mode != vllm.config.CompilationMode.NONE

    # Shared experts have a stream of their own there, but in steps with deltas.
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    experts = next(m for m in runner.model.modules() if isinstance(m, SharedExperts))
    monkeypatch.setattr(experts, "_stream", "another", raising=False)
    monkeypatch.setattr(CpuPlatform, "is_cuda_alike", lambda self: True)
    for slot, order in (
        (0, SharedExpertsOrder.NO_OVERLAP),
        (BASE, SharedExpertsOrder.MULTI_STREAM_OVERLAPPED),
    ):
        rows = np.array([slot], dtype=np.int32)
        runner.lora_manager.step.set(rows)
        assert experts._determine_shared_experts_order(torch.zeros(1, 96)) == order


def move(model, folder, seed, part=""):
    """Save ``model``; the parameters with ``part`` in their name moved at random."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("part", ["bias", "norm.weight"])
def test_half_of_a_layer_norm(part, tmp_path):
    """What a fine-tune leaves alone of a norm is the base's."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["opt"])
    base = move(model, tmp_path / "base", 1)
    tuned = move(model, tmp_path / "model", 2, part)
    check_mixed_batch(base, [tuned], tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_in_another_order_are_refused_by_name(family, tmp_path, dtype):
    """The checkpoint beside the folder from which the model was loaded differs."""
    from vllm_dqrelo import load_delta
    from vllm_dqrelo.worker.order import REARRANGED, unlike

    made = family("llama")
    llm = engine(made.base, dtype)
    core = llm.llm_engine.engine_core.engine_core
    manager = core.model_executor.driver_worker.worker.model_runner.lora_manager
    tensors = load_file(made.base / "model.safetensors")
    layer = "model.layers.1.{}.weight"
    changes = {
        # rows of each head of q interleaved, a square matrix turned, a norm rolled
        layer.format("self_attn.q_proj"): lambda t: t.view(3, 32, 96).transpose(0, 1),
        layer.format("self_attn.o_proj"): lambda t: t.T,
        layer.format("mlp.up_proj"): lambda t: t.flip(1),
        layer.format("input_layernorm"): lambda t: t.roll(1),
        "model.embed_tokens.weight": lambda t: t.roll(1, 0),
        "lm_head.weight": lambda t: t.flip(0),
    }
    for name, change in changes.items():
        tensors[name] = change(tensors[name]).reshape(tensors[name].shape).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(made.base / "config.json", tmp_path)
    cpu = torch.device("cpu")
    assert unlike(manager.sites, Checkpoint(made.base), cpu) == {}
    found = unlike(manager.sites, Checkpoint(tmp_path), cpu)
    assert found == dict.fromkeys(changes, REARRANGED)
    manager.unlike = found
    name = layer.format("self_attn.q_proj")
    with pytest.raises(Exception, match=f"{name}: vLLM has it in another order"):
        load_delta(llm, "delta", str(made.deltas[0]))


VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 96, "num_heads": 2}
MROPE = {"rope_type": "default", "mrope_section": [4, 6, 6]}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "image_size": 32,
    "patch_size": 16,
}
# Configuration, language part, a part that sees images.
MULTIMODAL = {
    "qwen2-vl": (
        Qwen2VLConfig(
            text_config={**GROUPED, **UNTIED, "rope_parameters": MROPE},
            vision_config=VISION,
            **UNTIED,
        ),
        "language_model",
        "visual.merger",
    ),
    "idefics3": (
        Idefics3Config(
            text_config=LlamaConfig(**GROUPED, **UNTIED),
            vision_config=SIGLIP,
            image_token_id=319,
            **UNTIED,
        ),
        "text_model",
        "connector",
    ),
}


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_language_part_of_a_multimodal_model(kind, tmp_path):
    """Text only; a fine-tune of the part that sees images is refused by name."""
    from vllm_dqrelo import load_delta

    if kind == "qwen2-vl":
        pytest.importorskip("torchvision", reason="vLLM's Qwen2-VL needs it")
    config, language, vision = MULTIMODAL[kind]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    base, *tuned = (
        move(model, tmp_path / f"model-{seed}", seed, language) for seed in (1, 2, 3)
    )
    text = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
    llm = check_mixed_batch(base, tuned, tmp_path, AutoModelForImageTextToText, **text)
    images = move(model, tmp_path / "images", 4, vision)
    convert(str(base), str(images), tmp_path / "delta", 0.25)
    with pytest.raises(Exception, match=rf"{vision}\S+, are outside of the language"):
        load_delta(llm, "images", str(tmp_path / "delta"))


def test_only_the_language_model_has_sites():
    from vllm_dqrelo.worker.sites import Sites
    from vllm_dqrelo.worker.tower import is_beside

    class Multimodal(torch.nn.Module):
        supports_multimodal = True

        def __init__(self):
            super().__init__()
            self.vision = torch.nn.LayerNorm(4)
            self.language = torch.nn.Sequential(torch.nn.LayerNorm(4))

        def get_language_model(self):
            return self.language

    model = Multimodal()
    sites = Sites(model, ["vision.weight", "language.0.weight"])
    assert list(sites.by_name) == ["language.0"]
    assert sites.places("language.0.bias") and not sites.places("vision.bias")
    assert is_beside(model, "vision.bias")
    assert not is_beside(model, "language.1.bias")
