# SPDX-License-Identifier: Apache-2.0
"""The hooks: what vLLM calls and what we patch, on the vLLM that is installed."""

import inspect
import re
import subprocess
import sys

import pytest

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def test_the_manager_has_all_that_vllm_calls():
    """Every use of the LoRA manager in vLLM's workers, found in their source."""
    import vllm.v1.worker
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    from vllm_dqrelo.worker.manager import DeltaManager

    used = set()
    for folder in vllm.v1.worker.__path__:
        for path in __import__("pathlib").Path(folder).rglob("*.py"):
            used |= set(re.findall(r"lora_manager\.(\w+)", path.read_text()))
    assert {"set_active_adapters", "add_adapter", "remove_all_adapters"} <= used
    missing = {name for name in used if not hasattr(DeltaManager, name)}
    assert not missing, f"vLLM calls {missing} of its LoRA manager"
    for name in sorted(used):
        stock = getattr(LRUCacheWorkerLoRAManager, name)
        if callable(stock):
            theirs = inspect.signature(stock).parameters
            ours = inspect.signature(getattr(DeltaManager, name)).parameters
            assert len(ours) == len(theirs), name


def test_what_a_server_s_start_needs_is_there(monkeypatch):
    """The names that functions import when they are called, but RequestError."""
    import ast

    import vllm_dqrelo
    from vllm_dqrelo.frontend.compat import set_up_environment

    found = {}
    for folder in vllm_dqrelo.__path__:
        for path in __import__("pathlib").Path(folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("vllm."):
                    names = found.setdefault(node.module, set())
                    names |= {alias.name for alias in node.names}
    assert found["vllm.outputs"] == {"RequestOutput", "RequestError"}
    found["vllm.outputs"].remove("RequestError")  # where EngineCoreOutput has it
    for module, names in found.items():
        exec(f"from {module} import {', '.join(names)}", {})
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "")
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    set_up_environment()
    assert __import__("os").environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_the_contract_test_can_fail(monkeypatch):
    from vllm_dqrelo.worker.manager import DeltaManager

    monkeypatch.delattr(DeltaManager, "pin_adapter")
    with pytest.raises(AssertionError, match="pin_adapter"):
        test_the_manager_has_all_that_vllm_calls()


def test_what_is_logged_is_in_vllm_s_log():
    """vLLM gives a handler and a level to the loggers below its own name."""
    import importlib
    import pkgutil

    import vllm_dqrelo

    loggers = []
    for module in pkgutil.walk_packages(vllm_dqrelo.__path__, "vllm_dqrelo."):
        if logger := getattr(importlib.import_module(module.name), "logger", None):
            loggers.append(logger.name)
    assert len(loggers) > 5
    assert all(name.startswith("vllm.") for name in loggers), loggers


def test_register_twice_and_the_method_is_known():
    import vllm_dqrelo
    from vllm_dqrelo.quantization import DqreloConfig

    vllm_dqrelo.register()
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_model_config
    vllm_dqrelo.register()
    assert EngineArgs.create_model_config is create
    from vllm.model_executor.layers.quantization import get_quantization_config

    assert get_quantization_config("dqrelo") is DqreloConfig


@pytest.mark.parametrize("version", ["0.30.2", "0.34.0", "1.0.0rc1"])
def test_vllm_outside_the_tested_range(monkeypatch, caplog, version):
    from vllm.model_executor.layers import quantization

    from vllm_dqrelo import plugin
    from vllm_dqrelo.format.errors import DqreloError
    from vllm_dqrelo.frontend.serve import check_plugin

    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(quantization, "QUANTIZATION_METHODS", [])
    logged = []
    monkeypatch.setattr(plugin.logger, "error", lambda *args: logged.append(args))
    plugin.register()
    assert quantization.QUANTIZATION_METHODS == []
    assert f"tested with vLLM >=0.31,<0.34, this is {version}" in str(logged)
    with pytest.raises(DqreloError, match="tested with vLLM >=0.31,<0.34"):
        check_plugin()


def test_every_route_of_a_delta_s_own_is_there_or_named(monkeypatch):
    from vllm_dqrelo import plugin
    from vllm_dqrelo.frontend import compat as compat_frontend
    from vllm_dqrelo.frontend import models

    plugin.patch_frontend()  # finds all of them
    gone = {"serve.tokenize.serving.ServingTokenization": ["create_nothing"]}
    monkeypatch.setattr(compat_frontend, "SERVING_METHODS", gone)
    with pytest.raises(RuntimeError, match="ServingTokenization.create_nothing"):
        compat_frontend.choose_handler(models.serving_twin)


def test_endpoints_are_added_to_the_plugins_that_would_be_loaded(monkeypatch):
    from vllm_dqrelo.frontend.serve import plugins_with_endpoints

    monkeypatch.setenv("VLLM_PLUGINS", "dqrelo,other")
    assert plugins_with_endpoints() == ["dqrelo", "other", "dqrelo_endpoints"]
    monkeypatch.delenv("VLLM_PLUGINS")
    assert {"dqrelo", "dqrelo_endpoints"} <= set(plugins_with_endpoints())


def test_a_hook_that_is_gone_is_named():
    from vllm_dqrelo.compat import find

    with pytest.raises(RuntimeError, match="has no math.pie, which vllm-dqrelo needs"):
        find(__import__("math"), "pie")


def test_what_a_release_does_by_itself():
    """It counts the adapters of all running requests, and says why a request failed."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import output_processor

    from vllm_dqrelo.compat import says_why
    from vllm_dqrelo.engine.compat import counts_running, reason_of_failure

    source = inspect.getsource(Scheduler.schedule)
    counted = re.search(r"scheduled_loras = set\([^)]*?for req in ([\w.]+)\s", source)
    assert counted and (counted[1] == "self.running") == counts_running()
    source = inspect.getsource(output_processor.OutputProcessor.process_outputs)
    assert ("put(error.to_exception())" in source) == says_why()
    fields = reason_of_failure("gone")
    assert fields.pop("stop_reason") == "gone"
    errors = [error.to_exception() for error in fields.values()]
    assert list(map(str, errors)) == ["gone"] * says_why()


def test_plugin_not_installed_or_not_allowed(monkeypatch):
    from importlib import metadata

    from vllm_dqrelo.format.errors import DqreloError
    from vllm_dqrelo.frontend.serve import check_plugin

    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(DqreloError, match="VLLM_PLUGINS=other"):
        check_plugin()
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr(metadata, "entry_points", lambda **_: [])
    with pytest.raises(DqreloError, match="vllm-dqrelo is not installed"):
        check_plugin()


def test_without_vllm_serve_says_what_to_install(monkeypatch):
    from vllm_dqrelo.format.errors import DqreloError
    from vllm_dqrelo.frontend.serve import check_plugin

    monkeypatch.delitem(sys.modules, "vllm_dqrelo.compat", raising=False)
    monkeypatch.delattr(__import__("vllm_dqrelo"), "compat", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(DqreloError, match=r'pip install "vllm-dqrelo\[vllm\]"'):
        check_plugin()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--delta", "math=/nowhere"], "is not a delta folder"),
        (["--delta", "/nowhere"], "expected NAME=DELTA"),
        (["--delta-dir", "/nowhere"], "/nowhere is not a folder"),
    ],
)
def test_serve_ends_before_vllm_starts(family, arguments, message):
    command = [sys.executable, "-m", "dqrelo_tools.cli", "serve"]
    made = family("llama")
    done = subprocess.run(
        [*command, str(made.base), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_serve_refuses_another_base_and_a_name_twice(family, capsys):
    from dqrelo_tools import cli

    made = family("llama")
    delta = f"math={made.deltas[0]}"
    assert cli.main(["serve", str(made.models[1]), "--delta", delta]) == 1
    assert "belongs to another base" in capsys.readouterr().err
    assert cli.main(["serve", str(made.base), "--delta", delta, "--delta", delta]) == 1
    assert "math is" in capsys.readouterr().err
