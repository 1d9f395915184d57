# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: torchvision without its operators, which no test calls.

The torchvision that pip finds is built for CUDA: beside a torch for CPUs its library
does not load, and then its Python part misses two operators. So that the test of
Qwen2-VL is not skipped:

    pip install --no-deps --target /tmp/torchvision torchvision
    PYTHONPATH=tests/support:/tmp/torchvision python -m pytest -p torchvision_ops \\
        tests/test_architectures.py -k qwen2-vl
"""

import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
