# SPDX-License-Identifier: Apache-2.0
"""What vLLM's engine receives: typed messages.

Its thread that decodes them (v1/engine/core.py:1901) ends at the first that has another
type, and with it, unseen by /health, every request after that.
"""

from typing import Any

from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder


def check_decodes(message: Any, kind: type) -> None:
    """Encode and decode a message as vLLM will.

    Raises:
        Exception: the engine could not decode it.
    """
    MsgpackDecoder(kind).decode(MsgpackEncoder().encode(message))
