"""The files in `examples/serve/`: what they name exists, and says what the code says."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

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


def test_the_documents_name_every_setting_and_metric() -> None:
    text = (ROOT / "docs" / "SERVING.md").read_text(encoding="utf-8")
    names = {*Settings.model_fields, *type(Settings().limits).model_fields, *type(Settings().batches).model_fields}
    assert not [name for name in sorted(names - {"limits", "batches"}) if f"`{name}`" not in text]
    source = Path(ROOT / "clora" / "serve" / "metrics.py").read_text(encoding="utf-8")
    assert not [name for name in re.findall(r'"(clora_\w+)"', source) if name not in text]
