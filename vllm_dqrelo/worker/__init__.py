# SPDX-License-Identifier: Apache-2.0
"""A worker's process, which has the model and the deltas' bytes."""
