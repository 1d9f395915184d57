# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint that are not parameters of the model, and are left out.

Only what the loaders of transformers and of vLLM leave out as well.
"""

import logging
import re
from collections.abc import Sequence

from vllm_dqrelo.format.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

BUFFER = re.compile(
    r"(^|\.)(rotary_(pos_)?emb\.\w*(inv_freq|cos_cached|sin_cached)|masked_bias"
    r"|position_ids|_extra_state)$"
)
CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention|self_attn)\.bias$")
MULTI_TOKEN = re.compile(r"^(model\.|language_model\.)*mtp\w*\.")
LAYER = re.compile(r"^(?:model\.|language_model\.)*layers\.(\d+)\.")
VALUE_HEADS = {"v_head", "value_head", "score"}


def leave_out(base: Checkpoint, model: Checkpoint, sides: Sequence[str]) -> None:
    """Drop tensors that are not parameters from both, with a warning for each kind.

    Args:
        sides: the names of the two in messages.
    """
    for checkpoint, side in zip((base, model), sides, strict=True):
        for what, is_one in KINDS.items():
            drop(
                checkpoint, side, what, {n for n in checkpoint if is_one(checkpoint, n)}
            )
    only = set(model) - set(base)
    heads = {name for name in only if name.partition(".")[0] in VALUE_HEADS}
    if set(base) <= set(model) and not is_classifier(model):
        drop(model, sides[1], "of a value head", heads)


def drop(checkpoint: Checkpoint, side: str, what: str, names: set[str]) -> None:
    """Leave tensors out of a checkpoint."""
    for name in names:
        checkpoint.drop(name)
    if names:
        logger.warning(
            "left out of the %s: %d tensors, for instance %s, which is %s",
            side,
            len(names),
            min(names),
            what,
        )


def is_buffer(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a model computes the tensor itself: frequencies, masks, positions."""
    if CAUSAL_MASK.search(name):
        return len(checkpoint.spec(name)[1]) == 4  # a bias has one dimension
    return bool(BUFFER.search(name))


def is_multi_token(checkpoint: Checkpoint, name: str) -> bool:
    """Whether only speculative decoding uses it: "mtp", or beyond the last layer."""
    text = checkpoint.config.get("text_config")
    config = text if isinstance(text, dict) else checkpoint.config
    if layer := LAYER.match(name):
        last = config.get("num_hidden_layers")
        extra = config.get("num_nextn_predict_layers")
        return bool(extra) and isinstance(last, int) and int(layer[1]) >= last
    return bool(MULTI_TOKEN.match(name))


def is_classifier(model: Checkpoint) -> bool:
    """Whether config.json says that the model classifies, and does not generate."""
    kinds = " ".join(map(str, model.config.get("architectures") or []))
    return "Classification" in kinds or "RewardModel" in kinds


KINDS = {
    "a buffer": is_buffer,
    "of a layer that predicts further tokens": is_multi_token,
}
