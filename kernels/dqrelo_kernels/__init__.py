# SPDX-License-Identifier: Apache-2.0
"""Ops that add many deltas to one batch. Needs torch; knows nothing of vLLM.

``layout``     how the signs of a matrix lie in memory and on disk
``table``      where the tensors of each resident delta lie in the arena
``rows``       which rows of a step belong to which delta
``reference``  what each op computes, in plain fp32 torch: the specification
``ops``        the public API: the custom ops ``torch.ops.dqrelo.*``
"""
