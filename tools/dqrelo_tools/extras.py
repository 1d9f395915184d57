# SPDX-License-Identifier: Apache-2.0
"""Packages that only some options need."""

from importlib.util import find_spec

from vllm_dqrelo.format.errors import DqreloError


def require(package: str, option: str) -> None:
    """Say how to install ``package`` when it is missing, without importing it."""
    if find_spec(package) is None:
        raise DqreloError(
            f"{option} needs {package}, which is not installed: "
            'pip install "vllm-dqrelo[bench]"'
        )
