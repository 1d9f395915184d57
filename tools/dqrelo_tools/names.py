# SPDX-License-Identifier: Apache-2.0
"""A fine-tune's parameters get the names that its base has for them.

A delta has the base's names: vLLM's loader of the base maps those.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from dqrelo_tools.experts import experts_of
from dqrelo_tools.generations import places
from dqrelo_tools.left_out import VALUE_HEADS, leave_out
from vllm_dqrelo.format.checkpoint import HEAD, HEADS, Checkpoint, ends_with
from vllm_dqrelo.format.part import WHOLE, Part

logger = logging.getLogger(__name__)

# torch.compile, FSDP, activation checkpointing, DeepSpeed and data parallelism put
# these into names; PEFT and TRL put those before them.
INSIDE = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module"
    r"|_forward_module|module)\."
)
BEFORE = re.compile(r"^((base_model\.model|pretrained_model)\.)+")

Names = Mapping[str, tuple[str, Part]]  # the base's -> the fine-tune's


def match_names(
    base: Checkpoint, model: Checkpoint, sides: Sequence[str] = ("base", "fine-tune")
) -> None:
    """Rename the parameters of ``model`` to those of ``base``; both are changed.

    Tensors that are not parameters are dropped from both. Parameters that cannot be
    matched keep their names.

    Args:
        sides: the names of the two in messages.
    """
    leave_out(base, model, sides)
    for found, what in (
        (without_wrappers, "names without wrappers"),
        (with_one_prefix, "names with another prefix"),
        (of_one_generation, "names, of another generation of the model"),
    ):
        ours, theirs = set(model) - set(base), set(base) - set(model)
        if not ours or not theirs:
            break
        if names := found(base, model, ours, theirs):
            model.rename(names)
            new, (old, _) = next(iter(names.items()))
            logger.info(
                "the %s's %s: %d, for instance %s is %s",
                sides[1],
                what,
                len(names),
                old,
                new,
            )
    leave_out(base, model, sides)


def names_of(base: Checkpoint, names: set[str]) -> dict[str, str]:
    """The base's names for those of an adapter's parameters that it calls otherwise."""
    found: dict[str, str] = {}
    ours, theirs = names - {*base, HEAD}, {*base} - names
    if ours:
        same = with_one_prefix(base, names, ours, theirs)
        found = {old: new for new, (old, _) in same.items()}
    if ours - found.keys() and (loads := places(base)):
        wanted = {loads(name): name for name in theirs}
        for name in sorted(ours - found.keys()):
            if (new := wanted.get(loads(name))) is not None:
                found[name] = new
    return found


def without_wrappers(
    base: Checkpoint, model: Checkpoint, ours: set[str], theirs: set[str]
) -> Names:
    """The names of ``ours`` without what trainers wrap a model in."""
    bare = {name: without_wrapper(name) for name in sorted(ours)}
    return renamed(model, {old: new for old, new in bare.items() if old != new})


def without_wrapper(name: str) -> str:
    """The name of a parameter in the wrapped model."""
    return BEFORE.sub("", INSIDE.sub("", name))


def with_one_prefix(
    base: Checkpoint, model: Iterable[str], ours: set[str], theirs: set[str]
) -> Names:
    """The names of ``ours`` with one prefix instead of another, where most need it."""
    needed = {
        name
        for name in ours  # the base may lack a head
        if not ends_with(name, HEADS) and not VALUE_HEADS.intersection(name.split("."))
    }
    prefixes: Counter[tuple[str, str]] = Counter()
    for names, others, is_base in ((needed, theirs, False), (theirs, needed, True)):
        for name in names:
            for tail in tails(name):
                if tail in others:
                    prefix = name.removesuffix(tail)
                    prefixes[("", prefix) if is_base else (prefix, "")] += 1
    if not prefixes:
        return {}
    (old, new), count = prefixes.most_common(1)[0]
    if 2 * count <= len(needed):
        return {}
    return renamed(
        model,
        {n: new + n.removeprefix(old) for n in sorted(ours) if n.startswith(old)},
    )


def tails(name: str) -> Iterator[str]:
    """The name without its first part, without its first two parts, ..."""
    while "." in name:
        _, _, name = name.partition(".")
        yield name


def renamed(model: Iterable[str], names: Mapping[str, str]) -> Names:
    """As ``Checkpoint.rename`` takes them; empty where two names would become one."""
    kept = [name for name in model if name not in names]
    if len({*kept, *names.values()}) < len(kept) + len(names):
        return {}
    return {new: (old, WHOLE) for old, new in names.items()}


def of_one_generation(
    base: Checkpoint, model: Checkpoint, ours: set[str], theirs: set[str]
) -> Names:
    """What transformers loads into the same parameter has the same name."""
    loads = places(base)
    if loads is None:
        return {}
    stored = {loads(name): name for name in sorted(ours)}
    wanted = {loads(name): name for name in sorted(theirs)}
    if len(stored) < len(ours) or len(wanted) < len(theirs):
        return {}
    names = {wanted[at]: (old, WHOLE) for at, old in stored.items() if at in wanted}
    fused = {at: old for at, old in stored.items() if at not in wanted}
    return names | experts_of(base, model, fused, wanted)
