"""Write the server's fields into the chart's values.schema.json, or compare them with it.

The rest of the schema is written by hand. `--check` compares, and exits with 1 if it is stale.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ladderstitch.config import ServerConfig
from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.replica.autoscaling import ScalingGoals
from ladderstitch.scheduling.settings import SchedulerSettings

PATH = Path(__file__).resolve().parents[1] / "deploy" / "chart" / "values.schema.json"
PORTS = ("port", "admin_port", "health_port", "metrics_port", "http_port")
ACCESS = frozenset(
    ("host", "admin_host", "tls_certificate", "tls_key", "tls_client_ca", "token_file", "drain_s")
) | {"insecure_public", "allowed_hosts"}
"""Fields that the templates set for replicas and gateways alike, or that tokens make useless."""
SET_ELSEWHERE = {
    "server": ACCESS
    | {"bundle", "tensor_parallel_size", "spare_ranks", "replicas", "gateways", "scheduling"},
    "gatewayServer": ACCESS
    | {"replicas", "share_port", "drain_announce_s", "replica_tls", "replica_ca"}
    | {"replica_certificate", "replica_key", "replica_server_name", "replica_token_file"},
}
"""Fields that other values or the templates set, by definition."""
KEPT = frozenset(
    ("description", "type", "enum", "anyOf", "items", "const", "pattern", "minimum", "maximum")
) | {"exclusiveMinimum", "exclusiveMaximum"}
"""Keywords that are taken from pydantic's schema."""
MODELS: dict[str, type[BaseModel]] = {
    "server": ServerConfig,
    "gatewayServer": GatewayConfig,
    "scheduling": SchedulerSettings,
    "goals": ScalingGoals,
}


def definition(name: str) -> dict[str, Any]:
    """Return the closed schema of a model's fields that values may set."""
    model = MODELS[name]
    fields = model.model_json_schema()["properties"]
    left_out = SET_ELSEWHERE.get(name, frozenset())
    if unknown := left_out - fields.keys():
        raise ValueError(f"{name}: expected fields of {model.__name__}, got {sorted(unknown)}")
    properties = {
        field: chosen(schema) for field, schema in fields.items() if field not in left_out
    }
    for field in properties.keys() & set(PORTS):  # a Service needs a number
        text = properties[field]["description"].partition(";")[0]
        properties[field] = {"description": text, "type": "integer"}
        properties[field] |= {"minimum": 1024, "maximum": 65_535}
    return {
        "description": f"Fields of {model.__name__}",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def chosen(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of a field's schema that Helm needs, without those for the CLI."""
    return {
        key: [chosen(part) for part in value] if key == "anyOf" else value
        for key, value in schema.items()
        if key in KEPT
    }


def formatted(schema: dict[str, Any]) -> str:
    """Return JSON with small objects and lists on one line."""
    text = json.dumps(schema, indent=2, ensure_ascii=False)
    small = re.compile(r"([\[{])\n\s+([^\[\]{}]{1,76}?)\n\s+([\]}])")
    while (shorter := small.sub(_on_one_line, text)) != text:
        text = shorter
    return text + "\n"


def _on_one_line(found: re.Match[str]) -> str:
    inner = re.sub(r",\n\s+", ", ", found[2])
    return found[0] if "\n" in inner else f"{found[1]}{inner}{found[3]}"


def main() -> int:
    """Write the schema; with `--check` return 1 if it is stale."""
    written = PATH.read_text()
    schema = json.loads(written)
    schema["definitions"] |= {name: definition(name) for name in MODELS}
    fresh = formatted(schema)
    if "--check" not in sys.argv[1:]:
        PATH.write_text(fresh)
        return 0
    if written != fresh:
        sys.stderr.write("stale: deploy/chart/values.schema.json; run `make manifests`\n")
    return int(written != fresh)


if __name__ == "__main__":
    sys.exit(main())
