# SPDX-License-Identifier: Apache-2.0
"""adapter_config.json: which keys of PEFT are read, and what the others must be."""

import math
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dqrelo.format.errors import DqreloError, refuse
from vllm_dqrelo.format.json_file import read_json

CONFIG = "adapter_config.json"
MERGE = (
    "merge the adapter into its base with PEFT (merge_and_unload, then "
    "save_pretrained) and convert that"
)
# Kinds of adapters that change how a prompt is read, and not the weights.
PROMPTS = (
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "POLY",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "XLORA",
)
# Initialisations that leave the base as it is, and those that take their first
# factors out of it.
PLAIN_INITS = ("eva", "gaussian", "mica", "orthogonal")
BASE_CHANGING_INITS = ("corda", "loftq", "lora_ga", "olora", "pissa")
# What these say has no part in what the saved factors mean.
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",  # compared with the base that is given
    "corda_config",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "lora_dtype",
    "lora_ga_config",
    "lorap_emb_lr",
    "lorap_lr_ratio",
    "megatron_core",
    "merge_weights",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Of a model's linear layers, PEFT's "all-linear" leaves out the last.
NOT_LINEAR = ("embed_tokens", "lm_head")
# Keys that may only be null, false or empty, as every unknown one.
REASONS = {
    "alora_invocation_tokens": "the factors act after these tokens only",
    "arrow_config": "several adapters are routed between",
    "fan_in_fan_out": "the matrices are those of Conv1D layers, transposed",
    "kasa_config": "training changed the base as well",
    "layer_replication": "the model has other layers than its base",
    "megatron_config": "the layers are Megatron's",
    "monteclora_config": "the factors are sampled",
    "target_parameters": "the factors are those of stacked experts",
    "use_bdlora": "the factors are block-diagonal",
    "use_qalora": "the factors act on groups of a quantised matrix",
    "velora_config": "the file has more than factors",
}
UNKNOWN = "this vllm-dqrelo does not know this option of PEFT"


def is_rank(value: Any) -> bool:
    """An integer above 0, and below 2^31."""
    return type(value) is int and 0 < value < 2**31


def is_number(value: Any) -> bool:
    """A number that is finite as a float."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def is_flag(value: Any) -> bool:
    """True, false or null."""
    return value is None or type(value) is bool


def is_list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A list whose elements pass ``test``."""
    return lambda value: isinstance(value, list) and all(map(test, value))


def is_pattern(value: Any) -> bool:
    """Text that is a regular expression."""
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except (re.error, RecursionError, OverflowError):
        return False


def is_patterns_to(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """An object from regular expressions to values that pass ``test``, or null."""
    return lambda value: (
        value is None
        or isinstance(value, dict)
        and all(is_pattern(key) and test(item) for key, item in value.items())
    )


def is_index(value: Any) -> bool:
    """An integer from 0 up."""
    return type(value) is int and value >= 0


is_names = is_list_of(lambda value: isinstance(value, str))
is_indices = is_list_of(is_index)


def is_selection(value: Any) -> bool:
    """Null, one regular expression, or a list of names."""
    return value is None or is_pattern(value) or is_names(value)


# key -> what its value must be, as a test and in words
READ: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alpha_pattern": (
        is_patterns_to(is_number),
        "an object from regular expressions to finite numbers",
    ),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only"),
    "ensure_weight_tying": (is_flag, "true or false"),
    "exclude_modules": (is_selection, "a regular expression or a list of names"),
    "init_lora_weights": (
        lambda v: is_flag(v) or isinstance(v, str),
        "true, false or the name of an initialisation",
    ),
    "layers_pattern": (is_selection, "a regular expression or a list of names"),
    "layers_to_transform": (
        lambda v: v is None or is_index(v) or is_indices(v),
        "a list of layers",
    ),
    "loftq_config": (lambda v: v is None or isinstance(v, dict), "an object"),
    "lora_alpha": (is_number, "a finite number"),
    "lora_bias": (is_flag, "true or false"),
    "modules_to_save": (lambda v: v is None or is_names(v), "a list of names"),
    "r": (is_rank, "an integer above 0"),
    "rank_pattern": (
        is_patterns_to(is_rank),
        "an object from regular expressions to integers above 0",
    ),
    "target_modules": (
        lambda v: v is not None and is_selection(v),
        "a regular expression or a list of names",
    ),
    "trainable_token_indices": (
        lambda v: (
            v is None
            or is_indices(v)
            or isinstance(v, dict)
            and all(map(is_indices, v.values()))
        ),
        "a list of tokens, or an object from modules to such lists",
    ),
    "use_dora": (is_flag, "true or false"),
    "use_rslora": (is_flag, "true or false"),
}


@dataclass(frozen=True)
class AdapterConfig:
    """The keys that say what an adapter's tensors mean, with PEFT's defaults.

    A module is named as in the model, without PEFT's own prefix.
    """

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool | None = False
    use_dora: bool | None = False
    lora_bias: bool | None = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    loftq_config: dict[str, Any] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: str | list[str] = ""
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool | None = False
    base_model_name_or_path: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "AdapterConfig":
        """Read and check the adapter_config.json of ``folder``.

        Raises:
            DqreloError: it is not a LoRA adapter whose factors mean a change of the
                published base; lists all reasons.
        """
        raw = read_json(folder / CONFIG)
        if not isinstance(raw, dict):
            raise DqreloError(f"{folder / CONFIG} is not a JSON object")
        kind = raw.pop("peft_type", None)
        if kind != "LORA":
            raise DqreloError(f"{folder} is not a LoRA adapter: {other_kind(kind)}")
        # PEFT would choose modules by the model's type; what it saves has them.
        raw.setdefault("target_modules", None)
        problems = [f"{CONFIG}: {found}" for found in key_problems(raw)]
        refuse(f"{folder} cannot be converted:", problems)
        kept = {key: raw[key] for key in READ.keys() & raw.keys()}
        named = raw.get("base_model_name_or_path")
        if isinstance(named, str) and named:
            kept["base_model_name_or_path"] = named
        return cls(**kept)

    def rank(self, module: str) -> int:
        """The rank of a module's factors."""
        return self._of(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rslora, of one module."""
        rank = self.rank(module)
        alpha = self._of(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (rank**0.5 if self.use_rslora else rank)

    def _of(self, patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
        """A per-module option, matched as PEFT does."""
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    def targets(self, module: str) -> bool:
        """Whether PEFT gives a module factors; it leaves out those of another."""
        if self.exclude_modules and selects(self.exclude_modules, module):
            return False
        if self.target_modules == "all-linear":
            return not module.endswith(NOT_LINEAR)
        if not selects(self.target_modules, module):
            return False
        layers = self.layers_to_transform
        if isinstance(self.target_modules, str) or layers is None or layers == []:
            return True
        patterns = self.layers_pattern or []
        names = [patterns] if isinstance(patterns, str) else patterns
        before = [rf"(?:^|.*?\.){name}" for name in names] or [r".*?\.[^.]*"]
        for pattern in before:
            if found := re.match(rf"{pattern}\.(\d+)\.", module):
                chosen = [layers] if isinstance(layers, int) else layers
                return int(found.group(1)) in chosen
        return False

    def saves(self, module: str) -> bool:
        """Whether a module is trained as a whole, in a copy of its own."""
        return any(is_within(module, name) for name in self.modules_to_save or [])

    @property
    def modules_with_tokens(self) -> list[str]:
        """The modules that trainable_token_indices is for; "" for the embedding."""
        chosen = self.trainable_token_indices
        if isinstance(chosen, dict):
            return [name for name, tokens in chosen.items() if tokens]
        return [""] if chosen else []

    def tokens(self, module: str) -> list[int]:
        """The rows of a module that are trained; in order of their values."""
        chosen = self.trainable_token_indices
        if isinstance(chosen, dict):
            return next((v for k, v in chosen.items() if module.endswith(k)), [])
        return chosen or []


def is_within(module: str, name: str) -> bool:
    """Whether ``name`` of modules_to_save has a module, or one that it is a part of."""
    parts = module.split(".")
    return any(".".join(parts[:n]).endswith(name) for n in range(1, len(parts) + 1))


def selects(selection: str | list[str], module: str) -> bool:
    """Whether PEFT's selection, one pattern or a list of names, has ``module``."""
    if isinstance(selection, str):
        return bool(re.fullmatch(selection, module))
    return any(f".{module}".endswith(f".{name}") for name in selection)


def key_problems(raw: dict[str, Any]) -> list[str]:
    """What in the parsed file cannot be taken, by its key."""
    found = []
    for key, value in sorted(raw.items()):
        got = f"{key} is {reprlib.repr(value)}"
        if key in READ:
            test, expected = READ[key]
            if not test(value):
                found.append(f"{got}, expected {expected}")
            elif key == "init_lora_weights" and isinstance(value, str):
                found += init_problems(value, got)
        elif key not in HARMLESS and not is_unset(value):
            found.append(f"{got}: {REASONS.get(key, UNKNOWN)}; {MERGE}")
    return found


def init_problems(value: str, got: str) -> list[str]:
    """Why factors that started so are not a change of the published base."""
    name = value.lower()
    if name in PLAIN_INITS:
        return []
    if not name.startswith(BASE_CHANGING_INITS):
        return [f"{got}, expected one of {', '.join(PLAIN_INITS)}; {MERGE}"]
    way_out = (
        "Let PEFT save the adapter as plain LoRA, save_pretrained(..., "
        "path_initial_model_for_weight_conversion=...), or merge it into the base that "
        "it was trained with and convert that"
    )
    return [f"{got}: training changed the base as well. {way_out}"]


def is_unset(value: Any) -> bool:
    """Null, false or empty."""
    return value is None or value is False or value in ("", [], {})


def other_kind(kind: Any) -> str:
    """Why an adapter of another ``peft_type`` is not taken, and the way out."""
    got = f"{CONFIG}: peft_type is {reprlib.repr(kind)}, expected 'LORA'"
    if kind in PROMPTS:
        return f"{got}. Such an adapter is not a change of weights: it cannot be served"
    return f"{got}. For a kind that can be merged, {MERGE}"
