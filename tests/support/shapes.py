# SPDX-License-Identifier: Apache-2.0
"""How large the tests' models are: options of a configuration of transformers."""

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 96,  # less than a block of signs
    "intermediate_size": 200,  # not a whole number of words
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = SHAPE | {"num_key_value_heads": 1, "head_dim": 32}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
