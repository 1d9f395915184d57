# SPDX-License-Identifier: Apache-2.0
"""Token ids that only another model of the server has."""

import sys
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from support.engines import free

from dqrelo_tools.convert import convert
from vllm_dqrelo.format.side_files import TOKENIZER_FILES

vllm = pytest.importorskip("vllm")
from vllm.exceptions import VLLMValidationError  # noqa: E402

pytestmark = pytest.mark.vllm

SIZES = {"base": 320, "fewer": 308, "more": 322}
ROOM = {"dqrelo": {"delta_memory_gib": 0.001, "added_tokens": 3}}
NAMES = ("stop_token_ids", "allowed_token_ids", "logprob_token_ids")


@pytest.fixture(scope="module")
def folders(family, save_model, tmp_path_factory) -> dict[str, Path]:
    """A base, and deltas with fewer and with more tokens; all have its tokenizer."""
    made, root = {"base": family("llama").base}, tmp_path_factory.mktemp("sizes")
    for name in ("fewer", "more"):
        added = SIZES[name] - SIZES["base"]
        model = save_model("llama", root / "model", seed=3, added_tokens=added)
        for file in TOKENIZER_FILES:
            (model / file).unlink(missing_ok=True)
        made[name] = root / name
        convert(str(made["base"]), str(model), made[name], 0.125)
    return made


@pytest.fixture(scope="module")
def served(folders):
    """``served(model, prompt, **params)``: its answer, of an engine with all three."""
    from vllm_dqrelo import load_delta

    llm = vllm.LLM(
        str(folders["base"]),
        quantization="dqrelo",
        additional_config=ROOM,
        enforce_eager=True,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=32,
    )
    requests = {
        name: load_delta(llm, name, str(folders[name])) for name in ("fewer", "more")
    }

    def answer(model, prompt=(1, 5, 9), **params):
        sampling = vllm.SamplingParams(temperature=0, max_tokens=3, **params)
        (output,) = llm.generate(
            {"prompt_token_ids": list(prompt)},
            sampling,
            lora_request=requests.get(model),
            use_tqdm=False,
        )
        return list(output.outputs[0].token_ids)

    answer.load = lambda name, folder: load_delta(llm, name, str(folder))
    yield answer
    llm.llm_engine.engine_core.shutdown()
    free()


@pytest.mark.parametrize("model", SIZES)
def test_only_tokens_of_its_own_model_can_be_named(served, model):
    """The last one can, the one after it cannot."""
    size = SIZES[model]

    def refused(parameter, token, *arguments, **params):
        message = (
            f"{parameter} has token ids that .* not have: {token}. .* 0 to {size - 1}"
        )
        with pytest.raises(VLLMValidationError, match=message) as error:
            served(model, *arguments, **params)
        assert error.value.parameter == parameter

    assert served(model, [1, size - 1, 9])
    refused("prompt", size, [1, size, 9])
    for name in NAMES:
        assert served(model, **{name: [size - 1]})
        refused(name, size, **{name: [5, size]})
    assert served(model, logit_bias={size - 1: 9.0})
    refused("logit_bias", size, logit_bias={size: 9.0})
    assert served(model, allowed_token_ids=[7]) == [7] * 3


def test_bad_words_that_a_model_has_no_tokens_for(served):
    assert served("base", bad_words=["w310"])
    assert served("fewer", bad_words=["w307"])
    with pytest.raises(VLLMValidationError, match="bad_words has .*: 310. .* to 307"):
        served("fewer", bad_words=["w310"])


def test_a_grammar_of_tokens_that_a_model_lacks(served):
    """Nothing that it allows can be written; the engine goes on."""
    from vllm.sampling_params import StructuredOutputsParams

    before = served("fewer")
    choice = StructuredOutputsParams(choice=["w310"])
    served("fewer", structured_outputs=choice)
    assert served("fewer") == before


@pytest.mark.parametrize("size", [320, 10**30])
def test_a_delta_that_has_not_fewer_tokens_than_it_says(
    served, folders, tmp_path, size
):
    """Refused, and the others go on."""
    from safetensors.torch import load_file

    from vllm_dqrelo.format.config import DeltaConfig
    from vllm_dqrelo.format.delta import write_delta

    config = replace(DeltaConfig.read(folders["fewer"]), vocab_size=size)
    tensors = load_file(folders["fewer"] / "delta_model.safetensors")
    write_delta(tmp_path, config, tensors)
    with pytest.raises(Exception, match=f"vocab_size is {size}, expected fewer .* 320"):
        served.load("wrong", tmp_path)
    assert served("fewer")


def test_every_parameter_of_token_ids_is_known():
    """What vLLM's SamplingParams has, but for what only vLLM itself sets."""
    from vllm_dqrelo.frontend.token_ids import PARAMETERS

    fields = set(vllm.SamplingParams.__struct_fields__)
    mine = {*PARAMETERS, "prompt_logprob_token_ids", "_bad_words_token_ids"}
    own = {"_all_stop_token_ids"}
    assert {name for name in fields if "token_ids" in name} == mine - {
        "logit_bias"
    } | own


def test_arrays_of_scored_tokens():
    """prompt_logprob_token_ids; -1 in it stands for no token."""
    import numpy as np
    from vllm.v1.engine import EngineCoreRequest

    from vllm_dqrelo.frontend.token_ids import keep_to_own_tokens

    params = vllm.SamplingParams(logprobs=-1)
    params.prompt_logprob_token_ids = np.array([[1, -1], [3, 307]], dtype=np.int32)
    request = EngineCoreRequest(
        "1", [1, 2], None, params.clone(), None, 0.0, None, None, None
    )
    keep_to_own_tokens(request, params, 308, "it")
    assert request.sampling_params.logprobs == 308 and params.logprobs == -1
    with pytest.raises(VLLMValidationError, match="prompt_logprob_token_ids .*: 307"):
        keep_to_own_tokens(request, params, 307, "it")


def test_placeholders_of_images_may_be_tokens_of_the_base():
    import torch
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.v1.engine import EngineCoreRequest

    from vllm_dqrelo.frontend.token_ids import keep_to_own_tokens

    def check(*ids):
        position = PlaceholderRange(1, 3, torch.tensor([False, True, True]))
        image = MultiModalFeatureSpec(None, "image", "hash", position)
        params = vllm.SamplingParams()
        request = EngineCoreRequest(
            "1", list(ids), [image], params, None, 0.0, None, None, None
        )
        keep_to_own_tokens(request, params, 308, "it", 320)

    check(1, 307, 319, 319, 5)
    for wrong in [
        (319, 307, 319, 319, 5),
        (1, 319, 319, 319, 5),
        (1, 307, 319, 5, 319),
    ]:
        with pytest.raises(VLLMValidationError, match=r"319. .* 0 to 307"):
            check(*wrong)
    with pytest.raises(VLLMValidationError, match=r"320. .* 0 to 319"):
        check(1, 307, 319, 320, 5)


@pytest.mark.slow
def test_over_http_it_is_a_400(folders, server, tmp_path):
    command = [Path(sys.executable).parent / "dqrelo", "serve", folders["base"]]
    command += ["--served-model-name", "base", "--additional-config"]
    command += ['{"dqrelo": {"delta_memory_gib": 0.001, "added_tokens": 3}}']
    for name in ("fewer", "more"):
        command += ["--delta", f"{name}={folders[name]}"]
    with server(command, tmp_path / "log") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def complete(model, prompt=(1, 5, 9), **options):
            return client.completions.create(
                model=model, prompt=list(prompt), max_tokens=2, temperature=0, **options
            )

        for model, size in SIZES.items():
            wrong = [
                ("prompt", {"prompt": [1, size]}),
                ("logit_bias", {"logit_bias": {str(size): 1}}),
                ("stop_token_ids", {"extra_body": {"stop_token_ids": [size]}}),
                ("allowed_token_ids", {"extra_body": {"allowed_token_ids": [size]}}),
            ]
            for parameter, options in wrong:
                with pytest.raises(openai.BadRequestError) as error:
                    complete(model, **options)
                assert error.value.param == parameter, (model, parameter)
                assert f"{model} does not have: {size}" in str(error.value)
            assert complete(model, [1, size - 1]).choices[0].text
        with pytest.raises(openai.BadRequestError, match="bad_words"):
            complete("fewer", extra_body={"bad_words": ["w310"]})
