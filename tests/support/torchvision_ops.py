# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: torchvision without its operators, which no test calls.

The torchvision that pip finds is built for CUDA: beside a torch for CPUs its library
does not load, and then its Python part misses two operators. So that the tests of
Gemma 3, LLaVA and Qwen2-VL are not skipped:

    pip install --no-deps --target /tmp/torchvision torchvision
    PYTHONPATH=tests/support:/tmp/torchvision python -m pytest -p torchvision_ops \\
        tests/test_images.py tests/test_architectures.py -k "gemma3 or llava or qwen2"
"""

import pytest
import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def look_at_models_here(monkeypatch):
    """vLLM imports a model's code in another process first, which lacks operators."""
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())
