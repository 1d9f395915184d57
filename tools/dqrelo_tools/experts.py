# SPDX-License-Identifier: Apache-2.0
"""Experts that a fine-tune stores side by side, and its base one by one."""

from collections import Counter
from collections.abc import Mapping

from dqrelo_tools.generations import Place
from vllm_dqrelo.format.checkpoint import Checkpoint
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.part import Part


def experts_of(
    base: Checkpoint,
    model: Checkpoint,
    stored: Mapping[Place, str],
    wanted: Mapping[Place, str],
) -> dict[str, tuple[str, Part]]:
    """The part of the fine-tune's tensor that each expert's matrix of the base is.

    Semantics: a tensor of E experts is [E, C N, K], or with every expert's matrix
    transposed [E, K, C N], where the base has C matrices [N, K] for each of them.

    Args:
        stored, wanted: the places of what only the fine-tune has, and only the base.

    Returns:
        As ``Checkpoint.rename`` takes it; empty where the shapes do not fit.

    Raises:
        DqreloError: the shapes do not say whether the matrices are transposed.
    """
    whole = {at.parameter: name for at, name in stored.items() if at.expert is None}
    experts = {
        at: name
        for at, name in wanted.items()
        if at.expert is not None and at.parameter in whole
    }
    counts = Counter(at.parameter for at in experts)
    layouts = {False, True}
    for at, name in experts.items():
        n, k = base.spec(name)[1]
        shape = model.spec(whole[at.parameter])[1]
        rows, count = at.chunks * n, counts[at.parameter] // at.chunks
        fitting = {False: [count, rows, k], True: [count, k, rows]}
        layouts &= {layout for layout, fits in fitting.items() if shape == fits}
    if experts and len(layouts) == 2:
        name = whole[next(iter(experts)).parameter]
        raise DqreloError(
            f"{name} of the fine-tune is {model.spec(name)[1]}: its matrices are "
            "square. Their shape does not say whether they are transposed. Save the "
            "fine-tune with save_pretrained of transformers 5, one expert by one"
        )
    parts = {}
    for layout in layouts:
        for at, name in experts.items():
            n = base.spec(name)[1][0]
            start = at.chunk * n
            part = Part(start, start + n, at.expert, layout)
            parts[name] = whole[at.parameter], part
    return parts
