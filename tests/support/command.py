# SPDX-License-Identifier: Apache-2.0
"""The command ``dqrelo`` in this process."""

from dqrelo_tools import cli


def run(*arguments: object) -> int:
    """The exit code of ``dqrelo ARGUMENTS``."""
    return cli.main([str(argument) for argument in arguments])
