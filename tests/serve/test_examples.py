"""The files in `examples/serve/`: what they name exists, and says what the code says."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from clora.serve.settings import Settings, load_settings
from tests.test_house import ROOT

FOLDER = ROOT / "examples" / "serve"


def test_the_example_settings_are_settings() -> None:
    settings = load_settings(FOLDER / "serve.yaml", {})
    assert (settings.artefact, settings.keys) == (FOLDER / "artefact", FOLDER / "keys.txt")
    assert settings.limits == Settings().limits and settings.batches == Settings().batches  # it shows the defaults


def test_the_manifests_probe_what_there_is_and_wait_long_enough() -> None:
    deployment, service = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8"))
    pod: dict[str, Any] = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    settings = load_settings(FOLDER / "serve.yaml", {})
    assert pod["terminationGracePeriodSeconds"] > settings.grace_seconds + pause
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert container["ports"][0]["containerPort"] == settings.port
    hosts = [header["value"] for header in container["readinessProbe"]["httpGet"]["httpHeaders"]]
    assert settings.allowed_hosts is not None and set(hosts) <= set(settings.allowed_hosts)


def test_the_unit_and_the_image_start_the_command_and_give_it_time() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(FOLDER / "clora.service", encoding="utf-8")
    assert "clora serve --config" in unit["Service"]["ExecStart"]
    assert int(unit["Service"]["TimeoutStopSec"]) > load_settings(FOLDER / "serve.yaml", {}).grace_seconds
    image = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    assert "USER 10001" in image and "/livez" in image and '"clora", "serve"' in image
    for path in re.findall(r"requirements/\S+?\.lock", image):
        assert (ROOT / path).is_file()


def test_the_recipes_let_an_engine_load_native_code_and_read_its_keys() -> None:
    """A package is unpacked in /tmp and loaded from there, after torch has looked at /proc/cpuinfo."""
    image = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    assert "--tmpfs /tmp:exec" in image and "--target build" in image and "chown 10001" in image
    assert "g++" in image.split("FROM ")[1]  # the stage that compiles an artefact for the image
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(FOLDER / "clora.service", encoding="utf-8")
    service = unit["Service"]
    assert "ProcSubset" not in service and "MemoryDenyWriteExecute" not in service
    name, place = service["LoadCredential"].split(":")
    assert service["ExecStart"].endswith(f"--keys ${{CREDENTIALS_DIRECTORY}}/{name}") and place == "/etc/clora/keys.txt"
    deployment, _ = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8"))
    volumes = {volume["name"]: volume for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert volumes["tmp"]["emptyDir"] == {"sizeLimit": "50Gi"}  # no medium: memory would count against the pod's


# The fields of Kubernetes' own types that the example uses: one that is misspelt is ignored by a server, silently.
FIELDS = {
    "pod": {"automountServiceAccountToken", "terminationGracePeriodSeconds", "securityContext", "containers",
            "volumes"},
    "container": {"name", "image", "args", "ports", "env", "securityContext", "resources", "startupProbe",
                  "readinessProbe", "livenessProbe", "lifecycle", "volumeMounts"},
    "probe": {"httpGet", "periodSeconds", "failureThreshold", "timeoutSeconds"},
    "pod security": {"runAsNonRoot", "runAsUser", "fsGroup", "seccompProfile"},
    "container security": {"allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities"},
    "mount": {"name", "mountPath", "subPath", "readOnly"},
}  # fmt: skip


def test_the_manifest_has_no_field_that_kubernetes_does_not_know() -> None:
    documents = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8")))
    assert [(one["apiVersion"], one["kind"]) for one in documents] == [("apps/v1", "Deployment"), ("v1", "Service")]
    pod = documents[0]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    found = [("pod", pod), ("container", container), ("pod security", pod["securityContext"])]
    found += [("container security", container["securityContext"])]
    found += [("probe", container[f"{name}Probe"]) for name in ("startup", "readiness", "liveness")]
    found += [("mount", mount) for mount in container["volumeMounts"]]
    for kind, fields in found:
        assert set(fields) <= FIELDS[kind], kind
    assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]


def test_the_image_is_built_of_what_there_is() -> None:
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    known = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "CMD"}
    assert {word for word, _ in lines} <= known and lines[0][0] == "FROM"
    stages = [rest.split()[-1] for word, rest in lines if word == "FROM" and " AS " in rest]
    copied = [found for word, rest in lines if word == "COPY" for found in re.findall(r"--from=(\S+)", rest)]
    assert copied and set(copied) <= set(stages)
    assert [word for word, _ in lines].index("USER") < [word for word, _ in lines].index("CMD")
    assert "--no-install-recommends" in text and "rm -rf /var/lib/apt/lists" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "clora" in project["scripts"]
    lock = (ROOT / "requirements" / "cpu.lock").read_text(encoding="utf-8")
    locked = {line.split("==")[0].lower().replace("_", "-") for line in lock.splitlines()}
    needed = [re.split(r"[>=<]", one)[0] for one in project["optional-dependencies"]["serve"]]
    assert set(needed) <= locked  # --no-deps: what the lock lacks the image would lack


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = (FOLDER / "clora.service").read_text(encoding="utf-8")
    unit = tmp_path / "clora.service"
    unit.write_text(text.replace("/opt/clora/bin/clora", sys.executable))  # it looks for the program
    found = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def test_the_documents_name_every_setting_and_metric() -> None:
    text = (ROOT / "docs" / "SERVING.md").read_text(encoding="utf-8")
    names = {*Settings.model_fields, *type(Settings().limits).model_fields, *type(Settings().batches).model_fields}
    assert not [name for name in sorted(names - {"limits", "batches"}) if f"`{name}`" not in text]
    source = Path(ROOT / "clora" / "serve" / "metrics.py").read_text(encoding="utf-8")
    assert not [name for name in re.findall(r'"(clora_\w+)"', source) if name not in text]
