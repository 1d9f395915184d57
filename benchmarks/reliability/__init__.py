# SPDX-License-Identifier: Apache-2.0
"""What was done to break it."""
