# SPDX-License-Identifier: Apache-2.0
"""A backend of Triton that compiles nothing: with it vLLM takes V2 on a CPU.

vLLM's CPU build uses Triton where Triton has a backend "cpu"; with TRITON_INTERPRET=1
its kernels then run in the interpreter. Every process that has this folder on
PYTHONPATH finds the backend, by the entry point beside it.
"""
