# SPDX-License-Identifier: Apache-2.0
"""What is checked and measured on the day a GPU is at hand."""
