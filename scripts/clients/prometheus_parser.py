# /// script
# dependencies = ["prometheus-client==0.22.1"]
#
# [tool.ladderstitch]
# package = "prometheus-client"
# quick = true
# ///
"""The metrics port: the page as Prometheus' own parser reads it, and the probes of a cluster."""

from __future__ import annotations

import os
from urllib.error import HTTPError
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

METRICS = os.environ["LADDERSTITCH_METRICS"]


def main() -> None:
    with urlopen(METRICS, timeout=60) as reply:
        families = {f.name: f for f in text_string_to_metric_families(reply.read().decode())}
    assert {"ladderstitch_build_info", "ladderstitch_requests", "process_cpu_seconds"} <= set(
        families
    )
    samples = [sample.name for family in families.values() for sample in family.samples]
    assert not [name for name in samples if name.endswith("_created")]
    assert all(family.documentation for family in families.values())
    print("ok /metrics")
    for page in ("healthz", "readyz"):
        with urlopen(METRICS.replace("/metrics", f"/{page}"), timeout=60) as reply:
            assert reply.read() == b"ok\n"
    print("ok probes")
    try:
        urlopen(METRICS.replace("/metrics", "/livez"), timeout=60)
    except HTTPError as error:
        assert error.code == 404
        print("ok other paths are 404")


if __name__ == "__main__":
    main()
