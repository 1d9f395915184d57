# SPDX-License-Identifier: Apache-2.0
"""deploy/: the image and the manifest, as far as they can be tested without either."""

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from dqrelo_tools import cli
from vllm_dqrelo.options import Options

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
DEPLOYMENT, SERVICE = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]
(SERVER,) = POD["spec"]["containers"]


def test_the_image_has_the_release_of_vllm_that_is_tested():
    tested = runpy.run_path(str(ROOT / ".ci" / "install_cpu.py"))["VLLM"]
    assert re.findall(r"^ARG VLLM_VERSION=(.*)$", DOCKERFILE, re.M) == [tested]
    assert {*re.findall(r"vllm-dqrelo:(\S+)", DOCKERFILE)} == {tested}
    assert SERVER["image"] == f"vllm-dqrelo:{tested}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = project["optional-dependencies"]["vllm"]
    assert Requirement(needed).specifier.contains(tested)


@pytest.mark.slow
def test_the_image_is_built_of_all_that_the_wheel_needs(tmp_path):
    """What the .dockerignore lets in makes a wheel with every package."""
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for name in [line[1:] for line in lines if line.startswith("!")]:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist"]
    subprocess.run([*command, tmp_path], check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = {*zipfile.ZipFile(wheel).namelist()}
    for package in ("vllm_dqrelo", "kernels/dqrelo_kernels", "tools/dqrelo_tools"):
        folder = ROOT / package
        sources = {str(f.relative_to(folder.parent)) for f in folder.rglob("*.py")}
        assert sources and sources <= names


@pytest.mark.slow
@pytest.mark.vllm
def test_the_server_takes_the_arguments_of_the_manifest():
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M) == ['["dqrelo", "serve"]']
    given = cli.split_values(["serve", *SERVER["args"]])
    ours, rest = cli.parser().parse_known_args(given)
    # What dqrelo serve gives to vLLM.
    arguments = [ours.base, "--quantization", "dqrelo", *rest]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    options = Options.of(parsed.additional_config)
    memory = SERVER["resources"]["limits"]["memory"]
    assert options.host_memory_gib < int(memory.removesuffix("Gi"))

    # The pod outlives the requests that the server ends before it exits.
    (waited,) = map(int, SERVER["lifecycle"]["preStop"]["exec"]["command"][1:])
    patience = POD["spec"]["terminationGracePeriodSeconds"]
    assert waited + parsed.shutdown_timeout < patience
    folders = [ours.base, *ours.delta_dir]
    mounts = {mount["mountPath"]: mount for mount in SERVER["volumeMounts"]}
    for folder in folders:
        (mount,) = [m for path, m in mounts.items() if folder.startswith(path)]
        assert mount["readOnly"]


def test_the_parts_of_the_manifest_fit_together():
    labels = POD["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    assert SERVICE["spec"]["selector"] == labels
    (port,) = SERVER["ports"]
    assert {p["targetPort"] for p in SERVICE["spec"]["ports"]} == {port["name"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert SERVER[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    volumes = {volume["name"] for volume in POD["spec"]["volumes"]}
    assert volumes == {mount["name"] for mount in SERVER["volumeMounts"]}
    assert SERVER["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_router_finds_the_replicas_and_its_scorers():
    router = yaml.safe_load((DEPLOY / "llm-d-router.yaml").read_text())["router"]
    assert router["modelServers"]["matchLabels"] == POD["metadata"]["labels"]
    (port,) = SERVER["ports"]
    targets = router["modelServers"]["targetPorts"]
    assert targets == [{"number": port["containerPort"]}]
    file = router["epp"]["pluginsConfigFile"]
    config = yaml.safe_load(router["epp"]["pluginsCustomConfig"][file])
    plugins = [plugin["type"] for plugin in config["plugins"]]
    (profile,) = config["schedulingProfiles"]
    scorers = [plugin["pluginRef"] for plugin in profile["plugins"]]
    assert scorers == [name for name in plugins if name.endswith("-scorer")]
    assert "lora-affinity-scorer" in scorers
