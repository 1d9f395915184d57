# SPDX-License-Identifier: Apache-2.0
"""Plain values that go from one process to another."""
