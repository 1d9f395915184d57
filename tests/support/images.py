# SPDX-License-Identifier: Apache-2.0
"""Tiny models that see images, each with its processor."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image
from support.shapes import GROUPED, TIED, UNTIED
from transformers import (
    Gemma3Config,
    Gemma3Processor,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLProcessor,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import (
    Gemma3ImageProcessorPil,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    Idefics3ImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import (
    SiglipImageProcessorPil,
)

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 32,
    "patch_size": 8,
}
SQUARE = {"height": 32, "width": 32}
TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }} "
    "{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE "
    "{% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
)


class Made(NamedTuple):
    """A model that sees images, without weights.

    Attributes:
        config, processor: of transformers.
        image: an image in a prompt.
        video: a video in a prompt; "" for a model without.
    """

    config: PretrainedConfig
    processor: ProcessorMixin
    image: str
    video: str = ""


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """One word a token, "w17" for token 17; the last tokens are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    last, size = [*special, *named.values()], GROUPED["vocab_size"]
    words = [*(f"w{i}" for i in range(size - len(last))), *last]
    vocabulary = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(last)
    return PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=named)


def llava() -> Made:
    """An image is 16 tokens in a row."""
    words = tokenizer("<image>")
    config = LlavaConfig(
        text_config=LlamaConfig(**GROUPED, **UNTIED),
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        **UNTIED,
    )
    processor = LlavaProcessor(
        SiglipImageProcessorPil(size=SQUARE),
        words,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return Made(config, processor, "<image>")


def idefics3(**text: int) -> Made:
    """An image is its tiles and the whole, 4 tokens each, and tokens that say which.

    Args:
        text: of the language model's configuration.
    """
    tiles = [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]
    names = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "\n")
    words = tokenizer(*tiles, *names, "<image>")
    config = Idefics3Config(
        text_config=LlamaConfig(**GROUPED | text, **UNTIED),
        vision_config=TOWER,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        **UNTIED,
    )
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
        ),
        words,
        image_seq_len=4,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return Made(config, processor, "<image>")


def gemma3() -> Made:
    """The 4 tokens of an image attend to each other."""
    named = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<img>"}
    words = tokenizer(*("\n" * i for i in (1, 2, 3, 4)), **named)
    ids = {key: words.convert_tokens_to_ids(token) for key, token in named.items()}
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**GROUPED, **TIED, sliding_window=8),
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        image_token_index=ids["image_token"],
        **TIED,
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size=SQUARE),
        words,
        image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<boi>"),
    )
    return Made(config, processor, "<boi>")


def qwen2_vl() -> Made:
    """Images of several sizes, and positions of three dimensions."""
    from transformers import Qwen2VLVideoProcessor

    names = ("<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>")
    words = tokenizer(*names)
    start, end, video, image = map(words.convert_tokens_to_ids, names)
    mrope = {"rope_type": "default", "mrope_section": [4, 6, 6]}
    config = Qwen2VLConfig(
        text_config={**GROUPED, **UNTIED, "rope_parameters": mrope},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 96, "num_heads": 2},
        vision_start_token_id=start,
        vision_end_token_id=end,
        video_token_id=video,
        image_token_id=image,
        **UNTIED,
    )
    pixels = {"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 12}
    shown, moving = (f"{names[0]}{names[i]}{names[1]}" for i in (3, 2))
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessorPil(size=pixels),
        words,
        Qwen2VLVideoProcessor(size=pixels),
        chat_template=TEMPLATE.replace("IMAGE", shown),
    )
    return Made(config, processor, shown, moving)


MADE: dict[str, Callable[[], Made]] = {
    "idefics3": idefics3,
    "idefics3-split": partial(idefics3, num_attention_heads=4, num_key_value_heads=2),
    "llava": llava,
    "gemma3": gemma3,
    "qwen2-vl": qwen2_vl,
}

# Models whose base has the names under which it was published, which vLLM knows; their
# fine-tunes have those of transformers.
RENAMED = ("llava", "gemma3")
PUBLISHED = ("vision_tower.", "vision_tower.vision_model.")


def picture(seed: int, width: int = 50, height: int = 40) -> Image.Image:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def clip(seed: int, frames: int = 4) -> np.ndarray:
    """A video of noise: uint8 [frames, height, width, 3]."""
    return np.stack([np.asarray(picture(seed * frames + i)) for i in range(frames)])
