# SPDX-License-Identifier: Apache-2.0
"""A tiny EAGLE head as a checkpoint, and its drafts by a plain loop.

EAGLE: arXiv 2401.15077; EAGLE-3: arXiv 2503.01840. The loop runs the head over all
tokens for each draft, with the layers of transformers.
"""

import json

import torch
from safetensors.torch import load_file, save_file
from torch.nn import Linear
from torch.nn.functional import embedding, linear
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama as llama

# The first token that EAGLE-3 drafts: it has an LM head of its own, without the others.
FIRST_TOKEN = 20


class Head(torch.nn.Module):
    """A random head that drafts the last token again, more or less.

    Args:
        method: "eagle", which has the LM head of the base, or "eagle3".
        base: folder of a Llama, whose embedding the head has.
    """

    def __init__(self, method, base):
        super().__init__()
        torch.manual_seed(0)
        self.config = AutoConfig.from_pretrained(base)
        self.config.num_hidden_layers = 1
        self.config._attn_implementation = "eager"
        self.layer = llama.LlamaDecoderLayer(self.config, 0)
        self.rotary = llama.LlamaRotaryEmbedding(self.config)
        width, self.is_third = self.config.hidden_size, method == "eagle3"
        self.fc = Linear((3 if self.is_third else 2) * width, width, bias=False)
        if self.is_third:
            attention = self.layer.self_attn
            for name in ("q_proj", "k_proj", "v_proj"):
                rows = getattr(attention, name).out_features
                setattr(attention, name, Linear(2 * width, rows, bias=False))
            self.hidden_norm = llama.LlamaRMSNorm(width)
            self.norm = llama.LlamaRMSNorm(width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(std=0.01)
        self.fc.weight.data[:, -width:] += torch.eye(width)
        tensors = load_file(base / "model.safetensors")
        self.embedding = tensors["model.embed_tokens.weight"]
        self.lm_head = tensors.get("lm_head.weight", self.embedding)
        if self.is_third:
            self.norm.weight.data.copy_(tensors["model.norm.weight"])
            self.lm_head = self.lm_head[FIRST_TOKEN:].clone()

    def save(self, folder):
        """Write the checkpoint, named as EAGLE names it."""
        layer = "midlayer." if self.is_third else "layers.0."
        tensors = {}
        for name, tensor in self.state_dict().items():
            if name.startswith("layer."):
                name = layer + name.removeprefix("layer.")
            elif name == "hidden_norm.weight":
                name = layer + name
            tensors[name] = tensor
        config = self.config.to_dict()
        if self.is_third:
            tensors["lm_head.weight"] = self.lm_head
            tensors["d2t"] = torch.full((len(self.lm_head),), FIRST_TOKEN)
            config |= {
                "architectures": ["LlamaForCausalLMEagle3"],
                "draft_vocab_size": len(self.lm_head),
                "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
            }
        else:
            del tensors["layers.0.input_layernorm.weight"]
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    @torch.inference_mode()
    def states(self, folder, tokens):
        """What a model shows the head of its tokens: [len(tokens), K]."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        inner, found = model.model, []
        for layer in inner.layers:
            layer.register_forward_pre_hook(lambda _, x: found.append(x[0][0]))
        inner.norm.register_forward_pre_hook(lambda _, x: found.append(x[0][0]))
        last = inner(torch.tensor([tokens])).last_hidden_state[0]
        return torch.cat(found, -1) if self.is_third else last

    @torch.inference_mode()
    def drafts(self, tokens, states, count):
        """``count`` tokens that the head drafts after ``tokens``.

        Args:
            states: of all ``tokens`` but the last, at least.
        """
        tokens, known = list(tokens), len(tokens)
        states = states[: known - 1]
        if self.is_third:
            states = self.fc(states)
        while len(tokens) < known + count:
            embedded = embedding(torch.tensor(tokens[1:]), self.embedding)
            out, state = self._forward(embedded, states)
            tokens.append(int(linear(out[-1], self.lm_head).argmax()))
            if self.is_third:
                tokens[-1] += FIRST_TOKEN
            states = torch.cat([states, state[-1:]])
        return tokens[known:]

    def _forward(self, embedded, states):
        """What goes into the LM head, and the state for the next draft: [M, K]."""
        layer, rows = self.layer, len(states)
        if self.is_third:
            x, residual = layer.input_layernorm(embedded), states
            x = torch.cat([x, self.hidden_norm(states)], -1)
        else:
            x = residual = self.fc(torch.cat([embedded, states], -1))
        mask = torch.full((rows, rows), -torch.inf).triu(1)
        places = self.rotary(x[None], torch.arange(rows)[None])
        x = residual + layer.self_attn(x[None], places, mask[None, None])[0][0]
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        return (self.norm(x), x) if self.is_third else (x, x)
