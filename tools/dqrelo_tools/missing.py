# SPDX-License-Identifier: Apache-2.0
"""Parameters that only a base has, or only its fine-tune: what explains them."""

import re
from collections.abc import Iterable, Sequence

from vllm_dqrelo.format.checkpoint import BESIDE, Checkpoint
from vllm_dqrelo.format.tensors import ADDED

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
# What the name of a tensor tells of a fine-tune that has it and should not.
TOLD_BY: tuple[tuple[str, str], ...] = (
    (
        r"lora_|\.base_layer\.|ia3_|\.modules_to_save\.",
        (
            "it is stored with an adapter inside. Merge the adapter with PEFT's "
            "merge_and_unload before saving, or convert the adapter's own folder"
        ),
    ),
    (
        r"(^|\.)(optimizer|exp_avg|exp_avg_sq|momentum_buffer|master_weights)\b",
        "it has states of an optimizer. Save the model alone, with save_pretrained",
    ),
    (
        (
            r"\.(absmax|quant_map|quant_state|qweight|qzeros|scales|biases|SCB|weight_packed"
            r"|weight_scale(_inv)?)\b"
        ),
        "its weights are quantised. Convert from the 16-bit checkpoint",
    ),
    (
        r"_amax$|fake_quant|activation_post_process|_quantizer\.",
        "it has the state of a quantiser. Save it without, in 16 bits",
    ),
    (
        r"^(score|classifier|classification_head|qa_outputs)\.",
        (
            "its weights are those of a classifier, which is not a fine-tune of a "
            "model that generates"
        ),
    ),
)

FUSED = {
    "base": "A delta has matrices only: such a base cannot have deltas of its experts",
    "fine-tune": "Save it with save_pretrained of transformers 5",
}


def missing(base: Checkpoint, model: Checkpoint) -> list[str]:
    """What explains that the names differ, and both sides' shares; empty if none do."""
    names = {name for name in model if not name.endswith(ADDED)}
    lacking, extra = sorted(set(base) - names), sorted(names - set(base))
    if not lacking and not extra:
        return []
    reason = explanation(base, model, lacking, extra)
    shares = [
        share(lacking, list(base), "the base", "the fine-tune"),
        share(extra, sorted(names), "the fine-tune", "the base"),
    ]
    return [*([reason] if reason else []), "; ".join(filter(None, shares))]


def share(some: Sequence[str], names: Sequence[str], side: str, other: str) -> str:
    """How many of a side's parameters the other lacks, with an example."""
    if not some:
        return ""
    verb = "is" if len(some) == 1 else "are"
    return (
        f"{len(some)} of {len(names)} parameters of {side} {verb} not in {other}, for "
        f"instance {some[0]}"
    )


def explanation(
    base: Checkpoint, model: Checkpoint, lacking: Sequence[str], extra: Sequence[str]
) -> str | None:
    """The first thing that explains the names, if anything does."""
    for pattern, what in TOLD_BY:
        if told := [name for name in extra if re.search(pattern, name)]:
            return f"{what} ({told[0]})"
    own, old = layers(model), layers(base)
    if own and old and own != old:
        return f"the fine-tune has {own} layers, the base has {old}"
    if lacking and not extra and all(BESIDE.search(name) for name in lacking):
        return (
            "only the language model is there. Save the whole model, or convert "
            "against the language model alone"
        )
    for side, checkpoint, some in (
        ("base", base, lacking),
        ("fine-tune", model, extra),
    ):
        experts = [name for name in some if ".experts." in name]
        fused = [name for name in experts if len(checkpoint.spec(name)[1]) == 3]
        if fused:
            return (
                f"the {side} has its experts side by side in one tensor ({fused[0]}), "
                f"and the other has not. {FUSED[side]}"
            )
    if extra and not lacking and all(name.endswith(".bias") for name in extra):
        return "the fine-tune has biases that the base does not have"
    return None


def layers(names: Iterable[str]) -> int:
    """How many layers the language model has, by its parameters' names."""
    found = [LAYER.search(name) for name in names if not BESIDE.search(name)]
    return len({match[1] for match in found if match})
