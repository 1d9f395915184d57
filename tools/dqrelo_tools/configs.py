# SPDX-License-Identifier: Apache-2.0
"""Whether two config.json say that two models compute the same."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from reprlib import Repr
from typing import Any

from vllm_dqrelo.format.model_config import ModelConfig, is_inert

logger = logging.getLogger(__name__)

# What a delta stores: an LM head that only one of the two has, and tokens.
STORED = {"tie_word_embeddings", "vocab_size"}
# Keys that a class of transformers turns into rope_parameters.
ROPE_KEYS = {"partial_rotary_factor", "rope_theta", "rotary_emb_base", "rotary_pct"}
# Keys that code of transformers or vLLM reads with getattr, though the model's class
# does not declare them, and what it takes an absent one for (tests/test_configs.py
# looks for others).
READ_ANYWAY: dict[str, Any] = {
    "ada_rms_norm_t_cond": False,
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bias": False,
    "dual_chunk_attention_config": None,
    "final_logit_softcapping": None,
    "head_dim": None,
    "is_causal": True,
    "layer_types": None,
    "llama_4_scaling": None,
    "logit_scale": 1.0,
    "mlp_bias": False,
    "mlp_only_layers": [],
    "n_group": None,
    "norm_topk_prob": None,
    "qk_norm": False,
    "qkv_bias": False,
    "routed_scaling_factor": 1.0,
    "shared_expert_intermediate_size": 0,
    "sliding_window": None,
    "topk_group": None,
    "use_bidirectional_attention": False,
}
# Values of absent keys of a rope (transformers' modeling_rope_utils.py).
ROPE_DEFAULTS = {
    "partial_rotary_factor": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
}
LENGTH = "max_position_embeddings"
# Ropes whose frequencies do not depend on max_position_embeddings.
FIXED_ROPES = {"default", "linear", "llama3", "proportional"}
SAME = {"swish": "silu"}  # one activation of two names

Values = dict[str, Any]
short = Repr()
short.maxstring = short.maxother = 80


def config_differences(base: ModelConfig, model: ModelConfig) -> list[str]:
    """Keys of config.json that make the two compute differently.

    Keys that differ and do not compute are said in the log, without those that are
    inert by nature.
    """
    if other := other_model(base, model):
        return [f"config.json: {other}"]
    as_written = base.parsed is None or model.parsed is None
    for config in (base, model):
        if config.problem:
            logger.warning(
                "transformers does not accept %s (%s): compared key by key",
                *(config.path, config.problem),
            )
    old, old_unknown = computing(base, as_written)
    own, own_unknown = computing(model, as_written)
    differ = different(old, own)
    lengths = [
        key
        for key in differ
        if key.rpartition(".")[2] == LENGTH
        and not uses_length(key, old)
        and not uses_length(key, own)
    ]
    found = [
        f"config.json: {told(key, old, own)}" for key in differ if key not in lengths
    ]
    if not found:
        for key in lengths:
            logger.info(
                "config.json: %s: the delta is served with the base's limit",
                told(key, old, own),
            )
        for key in different(old_unknown, own_unknown):
            logger.warning(
                "config.json: %s: an unknown key, taken for one that does not compute",
                told(key, old_unknown, own_unknown),
            )
    return found


def other_model(base: ModelConfig, model: ModelConfig) -> str | None:
    """The problem of two models of different classes; None without one."""
    one_class = base.parsed is not None and type(base.parsed) is type(model.parsed)
    if base.model_type != model.model_type and not one_class:
        told = f"model_type is {model.model_type!r}, the base has {base.model_type!r}"
        missing = f": write the base's into {model.path}"
        return f"{told}{'' if model.model_type else missing}"
    old, own = base.architecture, model.architecture
    if old and own and old.lower() != own.lower():
        return (
            f"architectures is {own}, the base has {old}: a delta is of a model that "
            "ends in the same head"
        )
    return None


def computing(config: ModelConfig, as_written: bool) -> tuple[Values, Values]:
    """What says how to compute, by dotted key; and the keys that no class declares.

    Args:
        as_written: without the model's class in transformers.
    """
    if as_written or config.parsed is None:
        from transformers import GenerationConfig

        # In an unknown class top_k may be the number of experts.
        sampling = GenerationConfig().to_dict().keys() - {"top_k"}
        values = {k: v for k, v in config.raw.items() if k not in sampling}
        found = list(flat(values, None))
    else:
        values = json.loads(config.parsed.to_json_string(use_diff=False))
        found = list(flat(values, config.parsed))
    declared = {key: value for key, value, known in found if known}
    declared |= contradiction(config.raw)
    others = {
        key: value
        for key, value, known in found
        if not known and value is not None and value is not False
    }
    return declared, others


def contradiction(raw: Values) -> Values:
    """A rope_theta that another one in rope_parameters overrides."""
    rope, theta = raw.get("rope_parameters"), raw.get("rope_theta")
    if not isinstance(rope, dict) or theta is None:
        return {}
    values = [v for k, v in leaves(rope, "") if k.endswith(".rope_theta")]
    return {"rope_theta": theta} if values and theta not in values else {}


def flat(
    values: Values, config: Any, prefix: str = ""
) -> Iterator[tuple[str, Any, bool]]:
    """Each dotted key with its value, and whether it is one that computes.

    Args:
        config: the ``PreTrainedConfig`` of ``values``; None where there is not one,
            and all keys count.
    """
    fields = config and {field.name for field in dataclasses.fields(config)}
    for key, value in normal(values, fields).items():
        name = prefix + key
        known = not fields or key in fields | READ_ANYWAY.keys() | {"model_type"}
        if fields and key not in fields and value == READ_ANYWAY.get(key):
            continue
        if key == "rope_parameters" and isinstance(value, dict):
            yield from ((k, v, known) for k, v in leaves(value, name))
        elif isinstance(value, dict) and known:
            part = getattr(config, key, None)
            part = part if dataclasses.is_dataclass(part) else None
            yield from flat(value, part, f"{name}.")
        elif known or not key.startswith("_"):
            yield name, value, known


def leaves(values: Values, name: str) -> Iterator[tuple[str, Any]]:
    """Each dotted key of a dict in a dict."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{name}.{key}")
        else:
            yield f"{name}.{key}", value


def normal(values: Values, fields: set[str] | None) -> Values:
    """One level of a config.json in one spelling, without what does not compute."""
    kind = values.get("model_type")
    kept = {
        key: SAME.get(value, value) if isinstance(value, str) else value
        for key, value in values.items()
        if not is_inert(key, kind) and key not in STORED
    }
    scaling, rope = (kept.get(k) or {} for k in ("rope_scaling", "rope_parameters"))
    if isinstance(scaling, dict) and isinstance(rope, dict):
        kept.pop("rope_scaling", None)
        rope = scaling | rope
        if theta := kept.pop("rope_theta", None):
            rope.setdefault("rope_theta", theta)
        if rope:
            kept["rope_parameters"] = one_rope(rope)
    if fields is None:
        return kept
    if "rope_parameters" in fields:
        kept = {key: value for key, value in kept.items() if key not in ROPE_KEYS}
    if "layer_types" in fields:
        kept.pop("max_window_layers", None)  # layer_types says which they are
        if "sliding_window_pattern" not in fields:
            kept.pop("sliding_window_pattern", None)
        if "sliding_attention" not in (kept.get("layer_types") or []):
            kept["sliding_window"] = None
    if not kept.get("sliding_window"):
        kept.pop("use_sliding_window", None)
    width, heads = kept.get("hidden_size"), kept.get("num_attention_heads")
    if not kept.get("head_dim") and isinstance(width, int) and isinstance(heads, int):
        kept["head_dim"] = width // max(heads, 1)
    return kept


def one_rope(rope: Values) -> Values:
    """A rope, or one for each type of layer, with the values of absent keys."""
    if any(isinstance(value, dict) for value in rope.values()):
        return {k: one_rope(v) for k, v in rope.items() if isinstance(v, dict)}
    kept = {k: v for k, v in rope.items() if v is not None and k != "type"}
    return ROPE_DEFAULTS | {"rope_type": rope.get("type", "default")} | kept


def uses_length(key: str, values: Values) -> bool:
    """Whether the max_position_embeddings at ``key`` enters a rope's frequencies."""
    prefix = key.removesuffix(LENGTH) + "rope_parameters."
    return any(
        str(kind) not in FIXED_ROPES
        and not (kind == "yarn" and rope.removesuffix("rope_type") + "factor" in values)
        for rope, kind in values.items()
        if rope.startswith(prefix) and rope.endswith(".rope_type")
    )


def different(old: Values, own: Values) -> list[str]:
    """The keys whose values differ; an absent one is null."""
    keys = sorted(old.keys() | own.keys())
    return [key for key in keys if old.get(key) != own.get(key)]


def told(key: str, old: Values, own: Values) -> str:
    """One difference in words."""
    before, after = (
        short.repr(values[key]) if key in values else "absent" for values in (old, own)
    )
    return f"{key} is {after}, the base has {before}"
