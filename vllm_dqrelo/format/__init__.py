# SPDX-License-Identifier: Apache-2.0
"""The delta folder: what its bytes mean, how it is read and written.

``config``      delta_config.json
``tensors``     which tensors describe one parameter, and what they must look like
``checkpoint``  a Hugging Face checkpoint, read tensor by tensor; its fingerprint
``delta``       a whole delta folder: checked on opening, written in one piece

docs/format.md is normative. Nothing here imports vLLM.
"""
