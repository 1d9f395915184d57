# SPDX-License-Identifier: Apache-2.0
"""The compiler, which torch.compile asks for a hash (torch/utils/_triton.py:217)."""

from types import SimpleNamespace

from triton.backends.compiler import BaseBackend


class Compiler(BaseBackend):
    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "none"

    def parse_options(self, options):
        return SimpleNamespace(extern_libs=None)

    def add_stages(self, stages, options, language):
        raise NotImplementedError

    def load_dialects(self, context):
        pass

    def get_module_map(self):
        return {}
