# SPDX-License-Identifier: Apache-2.0
"""A request can only name tokens of its own model.

vLLM compares token ids with one vocabulary, which in a server with deltas has the
tokens of all models (vocabulary.py). Where it does not compare them, one id too many
ends the engine.
"""

from collections.abc import Collection
from itertools import chain, compress
from operator import not_

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

# Parameters that hold token ids; the keys of logit_bias are some.
PARAMETERS = (
    "stop_token_ids",
    "allowed_token_ids",
    "logit_bias",
    "logprob_token_ids",
    "trace_decode_token_ids",
)
SHOWN = 5  # ids in a message


def keep_to_own_tokens(
    request: EngineCoreRequest, params: object, size: int, model: str, base: int = 0
) -> None:
    """Refuse token ids that the model of a request does not have.

    Args:
        request: what vLLM made of it. Where it asks for the logprobs of all tokens, it
            asks for those of the model's from now on.
        params: as the client gave them; in ``request`` the tokens of the generation
            config are among them.
        size: of the model's vocabulary.
        model: its name.
        base: size of the base's vocabulary, whose placeholders an image may have: the
            image takes the place of their embeddings.

    Raises:
        VLLMValidationError: the request names other tokens.
    """
    text, placeholders = _text_and_placeholders(request)
    _check("prompt", text, size, model)
    _check("prompt", placeholders, max(size, base), model)
    own = request.sampling_params
    if own is None or not isinstance(params, SamplingParams):
        return
    for name in PARAMETERS:
        _check(name, getattr(params, name, None) or (), size, model)
    words = chain.from_iterable(own.bad_words_token_ids or ())
    _check("bad_words", list(words), size, model)
    scored = getattr(params, "prompt_logprob_token_ids", None)
    if scored is not None:  # an array, in which -1 stands for no token
        _check("prompt_logprob_token_ids", scored.clip(0).ravel().tolist(), size, model)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(own, name) == -1:
            setattr(own, name, size)


def _text_and_placeholders(request: EngineCoreRequest) -> tuple[list[int], list[int]]:
    """The prompt's tokens that are embedded, and those in whose place images are."""
    ids = request.prompt_token_ids or []
    if not request.mm_features:
        return ids, []
    is_text = [True] * len(ids)
    for feature in request.mm_features:
        for first, last in feature.mm_position.extract_embeds_range():
            is_text[first : last + 1] = [False] * (last + 1 - first)
    return list(compress(ids, is_text)), list(compress(ids, map(not_, is_text)))


def _check(parameter: str, ids: Collection[int], size: int, model: str) -> None:
    if not ids or 0 <= min(ids) <= max(ids) < size:
        return
    unknown = sorted({token for token in ids if not 0 <= token < size})
    found = ", ".join(map(str, unknown[:SHOWN]))
    more = f" and {len(unknown) - SHOWN} more" if unknown[SHOWN:] else ""
    raise VLLMValidationError(
        f"{parameter} has token ids that {model} does not have: {found}{more}. Its "
        f"tokens are 0 to {size - 1}",
        parameter=parameter,
        value=unknown,
    )
