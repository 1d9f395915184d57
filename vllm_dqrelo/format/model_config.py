# SPDX-License-Identifier: Apache-2.0
"""What a config.json says of a model, as transformers reads it."""

import json
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_dqrelo.format.errors import DqreloError

# Keys that change no logits, at every level of a config.json.
INERT = {
    # how it was initialised and trained
    "aux_loss_alpha",
    "gradient_checkpointing",
    "init_std",
    "initializer_cutoff_factor",
    "initializer_factor",
    "initializer_range",
    "input_jitter_noise",
    "pretraining_tp",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "seq_aux",
    "use_bfloat16",
    "z_loss_coefficient",
    # what a call returns in addition to the logits
    "id2label",
    "finetuning_task",
    "label2id",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "problem_type",
    "return_dict",
    "use_cache",
    "use_return_dict",
    # which tokens begin, end and fill a text: generation_config.json and tokenizer
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "prefix",
    "processor_class",
    "sep_token_id",
    "task_specific_params",
    "tokenizer_class",
    # where it came from, how it is stored, which kernels ran
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "architectures",  # configs.py compares the whole model's
    "attn_implementation",
    "auto_map",  # code of a checkpoint, which never runs here
    "compression_config",
    "dtype",
    "experts_implementation",
    "model_name",
    "name_or_path",
    "quantization_config",  # of the base, which is read as what it stands for
    "tf_legacy_loss",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_flash_attn",
}
# Parts of the names of keys that drop something in training only.
DROPPED = ("dropout", "drop_rate", "drop_path_rate", "layerdrop", "pdrop")
# Keys that are inert but in these model types, where they compute.
BUT_IN = {"router_jitter_noise": {"phimoe"}, "token_dropout": {"esm", "evolla"}}


def without_inert(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config.json, its sub-configs included, without the inert keys."""
    kind = config.get("model_type")
    return {
        key: without_inert(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not is_inert(key, kind)
    }


def special_float(value: dict[str, Any]) -> Any:
    """The infinity that transformers 5 writes as ``{"__float__": "Infinity"}``."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def is_inert(key: str, kind: Any) -> bool:
    """Whether the logits of a model type are the same whatever the value of a key."""
    if key in BUT_IN:
        return str(kind) not in BUT_IN[key]
    return key in INERT or any(part in key for part in DROPPED)


def rename_su(rope: Any) -> None:
    """Call the rope of the first Phi-3 as transformers calls it today, in place."""
    for key in ("type", "rope_type"):
        if isinstance(rope, dict) and rope.get(key) == "su":
            rope[key] = "longrope"


class ModelConfig:
    """A parsed config.json.

    Attributes:
        path: of the file, for errors.
        raw: its parsed content.
        problem: why transformers refuses its values, after ``parsed`` gave None.
    """

    def __init__(self, path: Path | str, raw: dict[str, Any]) -> None:
        self.path = path
        self.raw = raw
        self.problem: str | None = None

    @cached_property
    def parsed(self) -> Any | None:
        """The ``PreTrainedConfig`` of its model type, inert keys left out.

        It has the class's defaults for absent keys, and one spelling of the rope.
        None if transformers does not know the model type, or refuses the values.
        Runs no code but that of transformers.

        Raises:
            DqreloError: a value has another type than the class expects.
        """
        from huggingface_hub.errors import StrictDataclassFieldValidationError
        from transformers import CONFIG_MAPPING
        from transformers.utils import logging

        kind = self.model_type
        if kind not in CONFIG_MAPPING:
            return None
        level = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)  # transformers remarks on missing keys
        try:
            text = json.dumps(without_inert(self.raw))
            values = json.loads(text, object_hook=special_float)
            rename_su(values.get("rope_scaling"))
            return CONFIG_MAPPING[kind].from_dict(values)
        except StrictDataclassFieldValidationError as error:
            raise DqreloError(
                f"{self.path} is not a config.json of model_type {kind}: "
                f"{' '.join(str(error).split())}"
            ) from error
        except Exception as error:  # classes check their values in code of their own
            self.problem = " ".join(str(error).split())
            return None
        finally:
            logging.set_verbosity(level)

    @cached_property
    def model_type(self) -> str | None:
        """The model type; where the key is absent, that of the architecture."""
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        )

        if (kind := self.raw.get("model_type")) is not None:
            return kind if isinstance(kind, str) else None
        names = {
            **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        }
        types = (kind for kind, name in names.items() if name == self.architecture)
        return next(types, None)

    @property
    def architecture(self) -> str | None:
        """The class of the model, without FSDP's prefix; None if absent."""
        names = self.raw.get("architectures")
        if not (isinstance(names, list) and names and isinstance(names[0], str)):
            return None
        return names[0].removeprefix("FSDP")

    @property
    def tied(self) -> bool:
        """Whether the LM head is the embedding.

        The whole model's ``tie_word_embeddings`` goes before its language part's, as
        in transformers (``get_expanded_tied_weights_keys`` in modeling_utils.py) and
        vLLM (``with_hf_config`` in vllm/config/vllm.py).
        """
        whole, text = self._parts
        key = "tie_word_embeddings"
        return bool(getattr(whole, key, getattr(text, key, False)))

    @property
    def vocab_size(self) -> int | None:
        """The rows of the embedding; None if nothing says how many.

        Raises:
            DqreloError: the value is not an integer.
        """
        whole, text = self._parts
        size = getattr(text, "vocab_size", getattr(whole, "vocab_size", None))
        if size is not None and type(size) is not int:
            raise DqreloError(f"{self.path}: vocab_size is {size!r}, not an integer")
        return size

    @property
    def _parts(self) -> tuple[Any, Any]:
        """The whole model and its language part, as objects with the keys."""
        if self.parsed is None:
            text = self.raw.get("text_config")
            text = text if isinstance(text, dict) else self.raw
            return SimpleNamespace(**self.raw), SimpleNamespace(**text)
        try:
            return self.parsed, self.parsed.get_text_config(decoder=True)
        except ValueError:  # a model with several
            return self.parsed, self.parsed
