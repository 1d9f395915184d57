# SPDX-License-Identifier: Apache-2.0
"""Figures and tables of README and docs, from results/."""
