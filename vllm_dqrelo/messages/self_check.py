# SPDX-License-Identifier: Apache-2.0
"""The self-checks that passed: a JSON file for each kind of worker."""

FOLDER = "dqrelo/self_check"  # in vLLM's cache folder
RESULT = "result"  # a key of each file: the line that the worker logged
