# SPDX-License-Identifier: Apache-2.0
"""The subcommands of ``dqrelo``, one a file.

``add`` gives the command line a subcommand, and ``run`` is what the subcommand does.
``run`` imports what it needs: ``dqrelo --help`` loads neither torch nor vLLM.
"""
