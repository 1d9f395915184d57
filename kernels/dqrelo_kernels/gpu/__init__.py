# SPDX-License-Identifier: Apache-2.0
"""The ops in Triton."""
