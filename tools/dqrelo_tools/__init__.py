# SPDX-License-Identifier: Apache-2.0
"""The offline side: fine-tuned checkpoints to delta folders and back."""
