"""The compose file: its schema, the files that it mounts, and the options of its server."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import tool
from tests.deploy.schema_checks import validator

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MADE_BY_THE_READER = {"./tokens.yaml"}


def compose() -> Any:
    """Return the compose file."""
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_compose_file_matches_the_specification() -> None:
    validator("compose-spec").validate(compose())


def test_compose_schema_refuses_unknown_keys() -> None:
    import jsonschema

    wrong = compose()
    wrong["services"]["server"]["read_onyl"] = True
    with pytest.raises(jsonschema.ValidationError):
        validator("compose-spec").validate(wrong)


def test_mounted_files_exist() -> None:
    wanted = compose()
    sources = {file["file"] for file in wanted["secrets"].values()}
    named = set()
    for service in wanted["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            (sources if source.startswith(".") else named).add(source)
    missing = {source for source in sources if not (DEPLOY / source).is_file()}
    assert missing <= MADE_BY_THE_READER
    assert named == set(wanted["volumes"])
    build = wanted["services"]["server"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()


def test_ports_are_published_on_loopback_only() -> None:
    for name, service in compose()["services"].items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name


def test_server_is_unprivileged_and_needs_tokens() -> None:
    server = compose()["services"]["server"]
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert server["user"].endswith(":0")
    (option,) = (part for part in server["command"] if part.startswith("--token-file="))
    assert option == f"--token-file=/run/secrets/{server['secrets'][0]}"


def test_prometheus_configuration_and_targets() -> None:
    path = DEPLOY / "monitoring/prometheus.yaml"
    done = subprocess.run(
        [tool("promtool"), "check", "config", "--syntax-only", str(path)],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(path.read_text())
    mounts = dict(
        reversed(volume.split(":")[:2]) for volume in compose()["services"]["prometheus"]["volumes"]
    )
    assert config["rule_files"] == [name for name in mounts if name.endswith("rules.yaml")]
    (target,) = config["scrape_configs"][0]["static_configs"][0]["targets"]
    default = yaml.safe_load((ROOT / "examples/serve.yaml").read_text())["metrics_port"]
    assert target == f"server:{default}"


def test_grafana_finds_the_data_source_and_the_dashboard() -> None:
    services = compose()["services"]
    source = yaml.safe_load((DEPLOY / "monitoring/grafana/datasource.yaml").read_text())
    url = re.fullmatch(r"http://(\w+):9090", source["datasources"][0]["url"])
    assert url is not None
    assert url[1] in services
    folder = yaml.safe_load((DEPLOY / "monitoring/grafana/dashboards.yaml").read_text())
    mounted = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home in mounted
    assert home.startswith(folder["providers"][0]["options"]["path"] + "/")
