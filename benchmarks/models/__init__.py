# SPDX-License-Identifier: Apache-2.0
"""Bases and fine-tunes that the benchmarks make."""
