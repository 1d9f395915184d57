# SPDX-License-Identifier: Apache-2.0
"""The API server's process, or the caller of ``LLM``."""
