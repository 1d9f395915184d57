# SPDX-License-Identifier: Apache-2.0
"""How much of a fine-tune its delta keeps."""
