# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter in PEFT's format, opened as a fine-tune of its base."""

import logging
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

import torch

from dqrelo_tools.adapter_change import Change, is_copy
from dqrelo_tools.adapter_config import CONFIG, MERGE, AdapterConfig, is_within, selects
from dqrelo_tools.adapter_names import Name, Role, parse
from dqrelo_tools.left_out import BUFFER, VALUE_HEADS
from dqrelo_tools.names import names_of, without_wrapper
from vllm_dqrelo.format.checkpoint import (
    BESIDE,
    EMBEDDINGS,
    HEAD,
    Checkpoint,
    SafetensorsFiles,
    ends_with,
    locate,
)
from vllm_dqrelo.format.errors import refuse
from vllm_dqrelo.format.tensors import ADDED, SUFFIXES, MatrixDelta

STEM = "adapter_model"
# Weights that others leave in its folder. vLLM had the first for added tokens, TRL and
# LLaMA-Factory have the second for training with rewards.
NEW_ROWS = ("new_embeddings.safetensors", "new_embeddings.bin")
VALUE_HEAD = "value_head.safetensors"

logger = logging.getLogger(__name__)


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` is an adapter and not a checkpoint."""
    return (folder / CONFIG).is_file()


class Adapter:
    """An opened adapter: the parameters that it changes, as it leaves them.

    Iterating over it gives their names in order; among them are those of added tokens,
    and the LM head where the adapter unties it: then ``base`` is untied as well.

    Args:
        folder: of the adapter.
        base: the base, as plain or quantised parameters.
        names: how the base was named.

    Attributes:
        files: parameters and configuration -> the files that they come from.
        dense: the matrices whose change is of full rank.
        tokens: how many the fine-tune has, if the base's config.json says so.

    Raises:
        DqreloError: it is not a LoRA of ``base``; lists all reasons.
        FileNotFoundError: its tensors are not there.
    """

    def __init__(self, folder: Path, base: Checkpoint, names: Sequence[str]) -> None:
        self.folder, self.base = folder, base
        self.config = AdapterConfig.read(folder)
        self._tensors = SafetensorsFiles(locate(folder, STEM))
        self.files = {**self._tensors.files, CONFIG: folder / CONFIG}
        embeddings = [name for name in base if ends_with(name, EMBEDDINGS)]
        self._embedding = embeddings[0] if len(embeddings) == 1 else None
        self._changes: dict[str, Change] = {}
        self.tokens = base.model_config.vocab_size
        steps = (self._other_files, self._sort, self._check, self._tie, self._settle)
        for step in steps:
            refuse(f"{folder} cannot be converted:", list(step()))
        self.dense = [n for n in self if n in self._changes and self._changes[n].dense]
        self._tell(names)

    def __iter__(self) -> Iterator[str]:
        for name, change in sorted(self._changes.items()):
            if change.touches or name == HEAD and self.base.tied:
                yield name
            if change.rows > self.base.spec(name)[1][0]:
                yield name + ADDED

    @property
    def vocab_size(self) -> int | None:
        """The tokens of an adapter that has fewer than its base; None for another."""
        old, own = self.base.model_config.vocab_size, self.tokens
        return own if old is not None and own is not None and own < old else None

    def spec(self, name: str) -> tuple[str, list[int]]:
        """dtype as safetensors spells it, and shape; reads no data."""
        dtype, shape = self.base.spec(name.removesuffix(ADDED))
        if name.endswith(ADDED):
            rows = self._changes[name.removesuffix(ADDED)].rows
            return dtype, [rows - shape[0], *shape[1:]]
        return dtype, shape

    def get(self, name: str) -> torch.Tensor:
        """The whole parameter, on the CPU."""
        parameter = name.removesuffix(ADDED)
        before = self.base.get(parameter)
        value = self._changes[parameter].value(before)
        if not value.ndim:
            return value
        first = len(before)
        if name.endswith(ADDED):
            return value[first:].clone()
        return torch.cat((value[:first], before[len(value) :].to(value.dtype)))

    def matrix(self, name: str) -> MatrixDelta | None:
        """The change of a matrix as factors, where it has them."""
        change = self._changes.get(name)
        if change is None or change.dense or len(change.shape) != 2:
            return None
        return change.matrix(self.base.get(name) if change.tokens else None)

    def _other_files(self) -> Iterator[str]:
        """What else in the folder holds weights; most of it is told, not refused."""
        for name in NEW_ROWS:
            if (self.folder / name).is_file():
                yield (
                    f"{name} has rows of added tokens apart from the adapter. Load the "
                    "adapter with PEFT on the base resized to them, and save it again"
                )
        used = {path.name for path in self._tensors.files.values()}
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name.startswith("model"):
                yield (
                    f"the folder holds a whole model as well, {path.name}. Move one of "
                    "the two into a folder of its own"
                )
            elif path.name == VALUE_HEAD:
                logger.warning("%s is left out: no model generates with it", path)
            elif path.name not in used and path.name not in NEW_ROWS:
                logger.warning("%s is left out: it is not a part of the adapter", path)

    def _sort(self) -> Iterator[str]:
        """Give each tensor to the parameter that it is for."""
        parsed = {
            stored: parse(stored, self.config)
            for stored in self._tensors
            if not self._leaves_out(stored)
        }
        names = [name for name in parsed.values() if name]
        renamed = names_of(self.base, {name.parameter for name in names})
        has = {(name.module, name.role) for name in names}
        if self.base.tied and any(role == Role.ROWS for _, role in has):
            has.add((HEAD.rpartition(".")[0], Role.ROWS))
        for stored, name in parsed.items():
            if name is None:
                yield f"{stored} is not a factor of a plain LoRA; {MERGE}"
                continue
            parameter = renamed.get(name.parameter, name.parameter)
            change = self._change(parameter, name.module)
            if change is None:
                yield f"{stored}: the base has no {name.parameter}{why(name)}"
            elif is_ignored(name, has) and not self._is_of_base(stored, parameter):
                yield f"{stored}: PEFT does not load it together with the other tensors"
            else:
                yield from change.add(name.role, stored)
        for what, read in (
            ("without wrappers", [s for s, n in parsed.items() if n and n.wrapped]),
            ("as the base has them", sorted(renamed)),
        ):
            if read:
                logger.info("names %s: %d, for instance %s", what, len(read), read[0])
        if not self._tensors.files:
            yield "it has no tensors"

    def _is_of_base(self, stored: str, parameter: str) -> bool:
        """Whether a tensor has the base's values."""
        if parameter == HEAD and self.base.tied:
            parameter = self._embedding or ""
        return is_copy(self._tensors.get(stored), self.base.get(parameter))

    def _leaves_out(self, stored: str) -> bool:
        """Whether a tensor is not a parameter of a model that generates."""
        name = without_wrapper(stored)
        value_head = name.partition(".")[0] in VALUE_HEADS - {"score"}
        if out := value_head or bool(BUFFER.search(name)):
            logger.warning("%s is left out: no model generates with it", stored)
        return out

    def _change(self, parameter: str, module: str) -> Change | None:
        """The change of a parameter, made if need be; None if the base lacks it."""
        if parameter in self._changes:
            return self._changes[parameter]
        tied = self.base.tied and parameter == HEAD
        like = self._embedding if tied else parameter
        if like is None or like not in self.base:
            return None
        shape = self.base.spec(like)[1]
        resizes = parameter in (HEAD, self._embedding)
        resizes = resizes and shape[:1] == [self.base.model_config.vocab_size]
        self._changes[parameter] = Change(
            parameter, module, shape, resizes, tied, self._tensors, self.config
        )
        return self._changes[parameter]

    def _check(self) -> Iterator[str]:
        """The problems of the tensors, and the missing ones."""
        for parameter, change in sorted(self._changes.items()):
            yield from change.problems()
            if parameter.endswith((*SUFFIXES, ADDED)):
                yield f"{parameter} ends like a tensor of the delta format"
            if Role.UP in change.tensors and not change.embedding:
                bias = self._changes.get(f"{parameter.removesuffix('weight')}bias")
                has = bias is not None and Role.OFFSET in bias.tensors
                if has != bool(self.config.lora_bias):
                    yield (
                        f"{change.module}: lora_bias of {CONFIG} is "
                        f"{str(not has).lower()}, the file has {'a' if has else 'no'} "
                        "bias of its lora_B"
                    )
        whole, rows = (
            {c.module for c in self._changes.values() if role in c.tensors}
            for role in (Role.WHOLE, Role.ROWS)
        )
        head = HEAD.rpartition(".")[0]
        rows |= {head} if self.base.tied and rows - {head} else set()
        of_base = {n.rpartition(".")[0] for n in (*self.base, HEAD)}
        for name in self.config.modules_to_save or []:
            parts = [m for m in of_base if is_within(m, name)]
            if parts and not any(is_within(m, name) for m in whole):
                yield f"modules_to_save of {CONFIG} has {name}, the file does not"
        for name in self.config.modules_with_tokens:
            if not any(m.endswith(name) for m in (rows if name else rows - {head})):
                yield (
                    f"trainable_token_indices of {CONFIG} are set, the file has no "
                    f"rows of {name or 'an embedding'}"
                )

    def _tie(self) -> Iterator[str]:
        """Settle which of two tied matrices follow each other from now on."""
        names = (self._embedding, HEAD)
        if self.base.tied and any(name in self._changes for name in names):
            yield from self._untie(self._embedding or "")
        rows = {
            name: self._changes[name].rows
            if name in self._changes
            else self.base.spec(name)[1][0]
            for name in names
            if name and name in self.base
        }
        if len({*rows.values()}) > 1:
            found = " and ".join(f"{name} has {n}" for name, n in rows.items())
            yield (
                f"one matrix of the vocabulary was resized without the other: {found} "
                "rows. Save both, with save_pretrained(..., save_embedding_layers=True)"
            )
        elif self._embedding in self._changes:
            self.tokens = rows[self._embedding]

    def _untie(self, embedding: str) -> Iterator[str]:
        """Let the LM head be a parameter of its own, where its values will be.

        Semantics: what PEFT computes. Its base has one matrix for both; modules_to_save
        and factors change one of them, rows of tokens in the embedding change both.
        With ensure_weight_tying PEFT saves both, equal.
        """
        first = self._change(embedding, embedding.rpartition(".")[0])
        head = self._change(HEAD, HEAD.rpartition(".")[0])
        if first is None or head is None:
            return
        for one, other in ((first, head), (head, first)):
            shared = one.tensors.get(Role.ORIGINAL)
            if shared and other.add(Role.ORIGINAL, shared):
                yield (
                    f"{shared} and {other.tensors[Role.ORIGINAL]} differ, and the base "
                    "has one matrix for both"
                )
                return
        ensured, same = self.config.ensure_weight_tying, first.same(head)
        if Role.ROWS in first.own and head.own - {Role.ROWS}:
            yield f"{HEAD} is tied to rows of trainable_token_indices, and is changed"
        elif same or Role.ROWS in first.own and not head.own:
            del self._changes[HEAD]
        elif ensured:
            yield (
                f"ensure_weight_tying is true in {CONFIG}, and the file does not have "
                "the same values for both matrices"
            )
        else:
            self.base.untie()
            logger.info("the LM head is no longer the embedding: the adapter unties it")

    def _settle(self) -> Iterator[str]:
        """Read the base where the adapter has other values for the whole of it."""
        for parameter, change in sorted(self._changes.items()):
            change.settle(self.base.get(parameter) if change.whole else None)
            beside = BESIDE.search(parameter)
            if len(change.shape) > 2 and change.touches and not beside:
                yield (
                    f"{parameter} is {change.shape} and was changed: a delta has only "
                    "vectors and matrices"
                )

    def _tell(self, names: Sequence[str]) -> None:
        """Log what is unusual."""
        own = self.config.base_model_name_or_path
        if own and not any(same_model(own, name) for name in names):
            logger.warning(
                "%s was trained on %s, and is converted for %s",
                self.folder,
                own,
                " or ".join(names),
            )
        if self.config.loftq_config:
            logger.warning(
                "%s has a loftq_config: LoftQ made a base of its own for the adapter, "
                "and --base has to be that",
                self.folder,
            )
        modules = {c.module for c in self._changes.values() if Role.UP in c.own}
        targets = self.config.target_modules
        for name in targets if isinstance(targets, list) else []:
            if not any(selects([name], module) for module in modules):
                logger.warning(
                    "target_modules has %s, the file has no factors of it", name
                )
        if self.dense:
            logger.info(
                "not of low rank (DoRA, or trained as a whole), and compressed by "
                "--method at --ratio: %s%s",
                ", ".join(self.dense[:3]),
                ", ..." if self.dense[3:] else "",
            )


def is_ignored(name: Name, has: Set[tuple[str, Role]]) -> bool:
    """Whether PEFT's model has no parameter of that name.

    Args:
        has: modules, and what the file has for them.
    """
    if name.replaced_by:
        return (name.module, name.replaced_by) not in has
    replaced = any((name.module, role) in has for role in (Role.UP, Role.ROWS))
    return name.role == Role.ORIGINAL and replaced


def why(name: Name) -> str:
    """What explains that the base has no parameter for a bias of lora_B."""
    offset = name.role == Role.OFFSET
    return ", which lora_bias adds to: train without it" if offset else ""


def same_model(one: str, other: str) -> bool:
    """Whether two names are of one folder, or of one model on the Hub."""
    paths = Path(one).expanduser(), Path(other).expanduser()
    same = paths[0] == paths[1]
    return same or all(p.exists() for p in paths) and paths[0].samefile(paths[1])
