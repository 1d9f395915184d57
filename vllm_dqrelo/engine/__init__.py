# SPDX-License-Identifier: Apache-2.0
"""The process of vLLM's EngineCore."""
