# SPDX-License-Identifier: Apache-2.0
"""Serve dozens of delta-compressed full fine-tunes of one base model in vLLM."""

__version__ = "0.1.0"
