# SPDX-License-Identifier: Apache-2.0
"""What is measured, and what the documents show of it."""
