# SPDX-License-Identifier: Apache-2.0
"""The ops alone: how long they take, and what their machine code has."""
