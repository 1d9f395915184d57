# SPDX-License-Identifier: Apache-2.0
"""``dqrelo serve``: ``vllm serve`` with deltas, checked before it starts."""

import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from vllm_dqrelo.format.checkpoint import Checkpoint, resolve
from vllm_dqrelo.format.config import DeltaConfig
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.frontend.catalogue import DELTA_DIR, HUB_NAMESPACE, Catalogue

ENDPOINTS = "dqrelo_endpoints"  # in pyproject.toml


def serve(
    base: str,
    deltas: Sequence[str],
    vllm_arguments: Sequence[str],
    delta_dirs: Sequence[str] = (),
    hub_namespaces: Sequence[str] = (),
    endpoints: bool = False,
) -> int:
    """Serve ``base`` and its deltas with vLLM's OpenAI-compatible server.

    A wrong base, a missing delta, an inactive plugin or a delta that does not fit
    (start.py) is an error here, before vLLM spends time on loading; the workers check
    everything again.

    Args:
        base: a folder or a Hub id.
        deltas: "NAME=DELTA" each.
        vllm_arguments: passed on to ``vllm serve``.
        delta_dirs, hub_namespaces: see ``Catalogue``.
        endpoints: add the routes of ``endpoints.py``.

    Returns:
        The exit code.

    Raises:
        DqreloError: vLLM cannot be used, a delta does not belong to ``base``, or one
            of ``delta_dirs`` is not a folder.
        FileNotFoundError: the base or a delta is missing.
    """
    folders = parse_deltas(deltas)
    refuse_ours(vllm_arguments)
    if folders:
        fingerprint = Checkpoint(resolve(base)).fingerprint()
    for folder in folders.values():
        DeltaConfig.read(Path(folder)).check_base(fingerprint, base, folder)
    Catalogue(delta_dirs, hub_namespaces)
    check_plugin()
    from vllm_dqrelo import plugin
    from vllm_dqrelo.frontend import compat as frontend_compat

    for variable, values in (
        (DELTA_DIR, [str(Path(d).expanduser().absolute()) for d in delta_dirs]),
        (HUB_NAMESPACE, hub_namespaces),
    ):
        if values:
            os.environ[variable] = os.pathsep.join(values)
    if endpoints:
        os.environ["VLLM_PLUGINS"] = ",".join(plugins_with_endpoints())
    local = Path(base).expanduser()
    arguments = [str(local) if local.is_dir() else base, "--quantization", "dqrelo"]
    if folders:
        modules = [f"{name}={folder}" for name, folder in folders.items()]
        arguments += ["--lora-modules", *modules]
    plugin.patch_serve()
    try:
        frontend_compat.run_serve([*arguments, *vllm_arguments])
    except SystemExit as ended:
        if ended.__cause__ is None:
            raise
        raise DqreloError(str(ended.__cause__)) from ended  # of plugin.patch_serve
    return 0


def parse_deltas(deltas: Sequence[str]) -> dict[str, str]:
    """Name -> folder of "NAME=DELTA" arguments."""
    folders: dict[str, str] = {}
    for argument in deltas:
        name, equals, folder = argument.partition("=")
        if not (name and equals and folder):
            raise DqreloError(f"--delta {argument}: expected NAME=DELTA")
        if name in folders:
            raise DqreloError(f"--delta {argument}: {name} is {folders[name]} already")
        folders[name] = str(Path(folder).expanduser())
    return folders


def refuse_ours(vllm_arguments: Sequence[str]) -> None:
    """Refuse options of ``vllm serve`` that would override ours."""
    for argument in vllm_arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if name == "--lora-modules":
            raise DqreloError(f"{argument}: give deltas as --delta NAME=DELTA")
        if name in ("--quantization", "-q"):
            raise DqreloError(
                f"{argument}: dqrelo serve gives --quantization dqrelo; leave it out"
            )


def plugins_with_endpoints() -> list[str]:
    """The plugins that vLLM loads by default, and the endpoints."""
    if allowed := os.environ.get("VLLM_PLUGINS"):
        return [*allowed.split(","), ENDPOINTS]
    from vllm_dqrelo.frontend.compat import plugin_groups

    names = {
        plugin.name
        for group in plugin_groups()
        for plugin in metadata.entry_points(group=group)
    }
    return [*sorted(names), ENDPOINTS]


def check_plugin() -> None:
    """Refuse an environment in which vLLM would not know ``--quantization dqrelo``.

    vLLM only logs a plugin that it cannot load.
    """
    check_vllm()
    found = metadata.entry_points(group="vllm.general_plugins", name="dqrelo")
    if not found:
        raise DqreloError(
            "vLLM does not see the plugin: vllm-dqrelo is not installed in this "
            "environment; run pip install vllm-dqrelo"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "dqrelo" not in allowed.split(","):
        raise DqreloError(
            f"VLLM_PLUGINS={allowed} keeps vLLM from loading the plugin; add dqrelo"
        )


def check_vllm() -> None:
    """Refuse an environment without vLLM, or with a release that is not tested."""
    try:
        from vllm_dqrelo import compat
    except ImportError as error:
        raise DqreloError(
            f"vLLM cannot be imported ({error}); install it with "
            'pip install "vllm-dqrelo[vllm]"'
        ) from error
    if problem := compat.version_problem():
        raise DqreloError(problem)
