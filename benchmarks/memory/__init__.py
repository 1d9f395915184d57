# SPDX-License-Identifier: Apache-2.0
"""What deltas take in memory."""
