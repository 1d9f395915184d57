# SPDX-License-Identifier: Apache-2.0
"""What an adapter does to one parameter of its base."""

from collections.abc import Iterator

import torch

from dqrelo_tools.adapter_config import AdapterConfig
from dqrelo_tools.adapter_names import Role
from vllm_dqrelo.format.checkpoint import FLOAT_DTYPES, SafetensorsFiles
from vllm_dqrelo.format.tensors import LORA_A, LORA_B, SHAPE, MatrixDelta

# Rows trained one by one, up to which they are stored as factors of that rank. More of
# them are compressed as a matrix.
MOST_ROWS = 64
EMPTY = (
    "is empty: it was saved while DeepSpeed ZeRO-3 or FSDP had its parts elsewhere. "
    "Save the adapter again with the parameters gathered"
)


class Change:
    """The tensors that an adapter has for one parameter.

    Semantics: with ``W`` the stored ``WHOLE``, else ``ORIGINAL``, else the base's, and
    ``s`` the module's scaling,

        V = W + s * UP @ DOWN, or of a bias W + s * OFFSET
        value = MAGNITUDE * V / ||V||, the norm being that of each row

    where a missing tensor changes nothing; then ``ROWS`` replace the rows of
    trainable_token_indices. For an embedding PEFT's factors are transposed, and norm
    and magnitude are those of the columns.

    Args:
        parameter: its name in the base.
        module: that has it, as adapter_config.json names it.
        shape: in the base.
        resizes: whether it may have more rows than that, or fewer: one a token.
        tied: whether it is the LM head, and the base's is its embedding.

    Attributes:
        tensors: the adapter's, by what they do.
        rows: the number of its rows. The first are the base's; base rows that it
            lacks are kept.
        plain: whether ``W`` is a copy of the base's. ``settle`` finds out.
    """

    def __init__(
        self,
        parameter: str,
        module: str,
        shape: list[int],
        resizes: bool,
        tied: bool,
        files: SafetensorsFiles,
        config: AdapterConfig,
    ) -> None:
        self.parameter, self.module, self.shape = parameter, module, shape
        self.resizes, self.tied = resizes, tied
        self.files, self.config = files, config
        self.tensors: dict[Role, str] = {}
        self.plain = True

    @property
    def whole(self) -> str | None:
        """The tensor that replaces the base's; None without one."""
        return self.tensors.get(Role.WHOLE) or self.tensors.get(Role.ORIGINAL)

    @property
    def own(self) -> set[Role]:
        """The roles that change this matrix, and not a matrix tied to it."""
        return self.tensors.keys() - {Role.ORIGINAL}

    @property
    def rows(self) -> int:
        shape = self.files.spec(self.whole)[1] if self.whole else self.shape
        return shape[0] if shape else 1

    @property
    def embedding(self) -> bool:
        """Whether the factors are those of an embedding."""
        return "lora_embedding_" in self.tensors.get(Role.DOWN, "")

    @property
    def tokens(self) -> list[int]:
        """The rows that ``ROWS`` replace."""
        return self.config.tokens(self.module) if Role.ROWS in self.tensors else []

    def add(self, role: Role, stored: str) -> list[str]:
        """Take one tensor; returns the problems."""
        other = self.tensors.setdefault(role, stored)
        if other != stored and not self._equal(other, stored):
            return [f"{stored} and {other} both are for {self.parameter}, and differ"]
        return []

    def problems(self) -> list[str]:
        """The problems of the tensors; reads them. Call ``settle`` afterwards."""
        return list(self._shape_problems()) or list(self._value_problems())

    def _shape_problems(self) -> Iterator[str]:
        rank, rows = self.config.rank(self.module), self.rows
        of_base = f"{self.parameter} is {self.shape} in the base"
        for role, stored in sorted(self.tensors.items()):
            dtype, shape = self.files.spec(stored)
            if dtype not in FLOAT_DTYPES:
                yield f"{stored} is {dtype}, expected BF16, F16 or F32"
            elif 0 in shape:
                yield f"{stored} {EMPTY}"
            elif role in (Role.WHOLE, Role.ORIGINAL):
                if shape != self.shape and not (self.resizes and self._resized(shape)):
                    yield f"{stored} is {shape}, {of_base}"
            elif role != Role.OFFSET and len(self.shape) != 2:
                yield f"{stored}: {of_base}, and only a matrix has factors"
            elif shape != (expected := self._expected(role, rank, rows)):
                yield (
                    f"{stored} is {shape}, expected {expected}: {of_base}"
                    + (f", rank {rank}" if role in (Role.DOWN, Role.UP) else "")
                )
        present = self.tensors.keys()
        for one, other in ((Role.DOWN, Role.UP), (Role.UP, Role.DOWN)):
            if one in present and other not in present:
                yield f"{self.tensors[one]}: its other factor is not in the file"
        if Role.MAGNITUDE in present and not present >= {Role.DOWN, Role.UP}:
            yield f"{self.tensors[Role.MAGNITUDE]}: its factors are not in the file"
        if Role.DOWN in present and bool(self.config.use_dora) != (
            Role.MAGNITUDE in present
        ):
            said = str(bool(self.config.use_dora)).lower()
            has = "a" if Role.MAGNITUDE in present else "no"
            yield f"{self.module}: use_dora is {said}, the file has {has} magnitude"
        if Role.DOWN in present and present & {Role.WHOLE, Role.ROWS}:
            yield f"{self.module} has factors, and is trained otherwise as well"
        if {Role.WHOLE, Role.ROWS} <= present:
            yield f"{self.module} is in modules_to_save and trainable_token_indices"
        factors = self.own - {Role.WHOLE, Role.ROWS}
        follows = self.tied and self.config.ensure_weight_tying
        if factors and not (follows or self.config.targets(self.module)):
            stored = self.tensors[min(self.own)]
            yield (
                f"{stored}: target_modules of adapter_config.json does not select its "
                "module, so PEFT ignores it. Add the module there, or remove the tensor"
            )

    def _resized(self, shape: list[int]) -> bool:
        """Whether it is the base's shape but for the number of rows."""
        return bool(shape) and shape[1:] == self.shape[1:]

    def _expected(self, role: Role, rank: int, rows: int) -> list[int]:
        """The shape of a tensor that does not replace the base's."""
        columns = self.shape[-1]
        if role == Role.OFFSET:
            return self.shape
        if role == Role.ROWS:
            return [len(self.tokens), columns]
        if role == Role.MAGNITUDE:
            return [columns if self.embedding else rows]
        if self.embedding:
            return [rank, rows] if role == Role.DOWN else [columns, rank]
        return [rank, columns] if role == Role.DOWN else [rows, rank]

    def _value_problems(self) -> Iterator[str]:
        for stored in sorted(self.tensors.values()):
            if not bool(self.files.get(stored).isfinite().all()):
                yield f"{stored} has a NaN or an infinity"
        if Role.UP in self.tensors and not bool(self._up().isfinite().all()):
            scaling = self.config.scaling(self.module)
            yield f"{self.tensors[Role.UP]} times {scaling:g} is beyond float32"
        if len(set(self.tokens)) != len(self.tokens):
            yield f"trainable_token_indices names rows of {self.module} twice"
        if self.tokens and max(self.tokens) >= self.rows:
            yield (
                f"trainable_token_indices: {self.module} has no row "
                f"{max(self.tokens)}, but {self.rows}"
            )

    def settle(self, before: torch.Tensor | None) -> None:
        """Find out whether ``W`` is ``before``, the base's; None: it is."""
        self.plain = before is None or self.whole is None
        if before is not None and self.whole is not None:
            stored = self.files.get(self.whole)
            rows = slice(min(self.shape[0], self.rows)) if self.shape else ...
            self.plain = is_copy(stored[rows], before[rows])

    @property
    def touches(self) -> bool:
        """Whether rows of the base have other values."""
        trained = any(token < self.shape[0] for token in self.tokens)
        return not self.plain or trained or bool(self.own - {Role.WHOLE, Role.ROWS})

    @property
    def dense(self) -> bool:
        """Whether the change is a matrix of full rank, to be compressed."""
        full = not self.plain or Role.MAGNITUDE in self.tensors
        return len(self.shape) == 2 and (full or len(self.tokens) > MOST_ROWS)

    def value(self, before: torch.Tensor) -> torch.Tensor:
        """The parameter with all its rows; float32 where it is a sum.

        Args:
            before: the base's.
        """
        value = self.files.get(self.whole) if self.whole else before
        if Role.OFFSET in self.tensors:
            offset = self.files.get(self.tensors[Role.OFFSET]).float()
            scaled = self.config.scaling(self.module) * offset
            return (value.float() + scaled).to(value.dtype)
        if Role.DOWN in self.tensors:
            value = value.float() + self._up() @ self._down()
        if Role.MAGNITUDE in self.tensors:
            magnitude = self.files.get(self.tensors[Role.MAGNITUDE]).float()
            norm = value.norm(dim=0 if self.embedding else 1)
            factor = magnitude / norm
            value = value * (factor if self.embedding else factor[:, None])
        if self.tokens:
            trained = self.files.get(self.tensors[Role.ROWS])
            value = value.to(torch.promote_types(value.dtype, trained.dtype), copy=True)
            value[self.tokens] = trained.to(value.dtype)
        return value

    def matrix(self, before: torch.Tensor | None) -> MatrixDelta:
        """The change of the base's rows, where it is not ``dense``; of rank 1 if none.

        PEFT's A is [R, in] and B [out, R]. The scaling is folded into B.

        Args:
            before: the base's; None unless ``tokens``.
        """
        n, k = self.shape
        a, b = torch.zeros(1, k), torch.zeros(n, 1)
        dtype = torch.bfloat16
        if Role.DOWN in self.tensors:
            a, b = self._down(), torch.zeros(n, len(self._down()))
            b[: self.rows] = self._up()[:n]
            parts = (self.tensors[Role.DOWN], self.tensors[Role.UP])
            dtype = torch.promote_types(*(self.files.get(p).dtype for p in parts))
        kept = [i for i, token in enumerate(self.tokens) if token < n]
        if kept and before is not None:
            tokens = [self.tokens[i] for i in kept]
            trained = self.files.get(self.tensors[Role.ROWS])
            a = trained[kept].float() - before[tokens].float()
            b = torch.zeros(n, len(kept))
            b[tokens, range(len(kept))] = 1
            dtype = torch.promote_types(trained.dtype, before.dtype)
        if not all(bool(factor.to(dtype).isfinite().all()) for factor in (a, b)):
            dtype = torch.float32
        stored = {
            SHAPE: torch.tensor([n, k]),
            LORA_A: a.to(dtype).contiguous(),
            LORA_B: b.to(dtype).contiguous(),
        }
        return MatrixDelta.from_tensors("", stored)

    def _down(self) -> torch.Tensor:
        """A, float32 [R, in]."""
        role = Role.UP if self.embedding else Role.DOWN
        factor = self.files.get(self.tensors[role]).float()
        return factor.T if self.embedding else factor

    def _up(self) -> torch.Tensor:
        """B times the scaling, float32 [out, R]."""
        role = Role.DOWN if self.embedding else Role.UP
        factor = self.files.get(self.tensors[role]).float()
        factor = factor.T if self.embedding else factor
        return self.config.scaling(self.module) * factor

    def same(self, other: "Change") -> bool:
        """Whether both matrices have the same values from then on."""
        if Role.DOWN in self.tensors or Role.DOWN in other.tensors:
            return (
                {*self.own, *other.own} == {Role.DOWN, Role.UP}
                and self.own == other.own
                and torch.equal(self._down(), other._down())
                and torch.equal(self._up(), other._up())
            )
        return (
            self._equal(self.whole, other.whole)
            and self.tokens == other.tokens
            and all(
                self._equal(self.tensors[role], other.tensors[role])
                for role in {Role.ROWS} & self.own
            )
        )

    def _equal(self, one: str | None, other: str | None) -> bool:
        if one is None or other is None:
            return one is other
        return torch.equal(self.files.get(one).float(), self.files.get(other).float())


def is_copy(tensor: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether a tensor is what the base has, maybe rounded to another dtype."""
    return torch.equal(tensor, before.to(tensor.dtype))
