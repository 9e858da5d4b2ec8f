"""Scale and roll a real deployment on Ray under open-loop load, and count the lost requests.

Replicas listen on free ports. The load is balanced over the registered replicas, and a request that
ends with UNAVAILABLE is retried on another one, like gRPC's retry policy does. Writes figures and a
plot.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from balancing_client import EVENT_TIMEOUT_S, BalancingClient, Size
from fake_nodes import fake_cluster
from matplotlib import pyplot as plt

from ladderstitch.client import infer_request
from ladderstitch_loadtest.load.in_process import RequestSample, poisson, send_open_loop
from ladderstitch_loadtest.load.traces import BudgetClass

APP = "ladderstitch"
BUDGET = BudgetClass("all", 0.1)
HIGH = 150.0
"""Requests per second at high load, on a machine that is fast enough."""
RATE_STEP = 1.5
"""Ratio of the rates of two repetitions of a phase that waits for replicas."""
LOW_SHARE = 0.1
"""Low load as a share of the high one."""
MAX_UTILIZATION = 0.2
"""Largest share of its time that one replica may compute at high load."""
GOALS = {"quality": 0.947, "utilization": 0.03}
"""The utilization is so low that two cores suffice for all replicas and the load generator."""


@dataclass(frozen=True)
class Phase:
    """Load of one rate for `seconds`, repeated until `wanted` replicas and nodes exist.

    While there are fewer than that, each repetition has a higher rate, up to `HIGH`: on a busy
    machine the first rate may be too low to need another replica.
    """

    rate: float
    seconds: float
    wanted: int | None = None


def deploy(replicas: dict[str, Any], **args: Any) -> None:
    """Deploy like `serve deploy FILE`."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    application = {
        "name": APP,
        "route_prefix": None,
        "import_path": "ladderstitch.ray_serve.application:build",
        "args": {"port": 0, "metrics_port": 0, **args},
        "deployments": [{"name": "replica", **replicas}],
    }
    schema = ServeDeploySchema.model_validate({"applications": [application]})
    _get_global_client().deploy_apps(schema)


def scaling_options(max_replicas: int, up_s: float, down_s: float) -> dict[str, Any]:
    """Return options like those of the chart, with shorter delays."""
    return {
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": max_replicas,
            "upscale_delay_s": up_s,
            "downscale_delay_s": down_s,
            "metrics_interval_s": 0.5,
            "look_back_period_s": 4,
            "policy": {
                "policy_function": "ladderstitch.ray_serve.autoscaler:SlackPolicy",
                "policy_kwargs": GOALS,
            },
        }
    }


def poisson_requests(rate: float, seconds: float, rng: np.random.Generator) -> list[Any]:
    """Return (time, class, message) for each request of Poisson load."""
    out = []
    for at in poisson(rate, seconds, rng):
        pixels = rng.integers(0, 256, (1, 1, 28, 28), np.uint8)
        message = infer_request(pixels, budget_s=BUDGET.budget_s).SerializeToString()
        out.append((at, BUDGET, message))
    return out


async def measure_high_rate(client: BalancingClient) -> float:
    """Return the requests per second for high load: `HIGH`, or less on a slow machine."""
    latencies = []
    requests = poisson_requests(rate=HIGH, seconds=1.0, rng=np.random.default_rng(0))
    for _, _, message in requests[:50]:
        started = time.perf_counter()
        await client.call(message)
        latencies.append(time.perf_counter() - started)
    return min(HIGH, MAX_UTILIZATION / float(np.median(latencies)))


async def scale(client: BalancingClient, phases: Sequence[Phase]) -> dict[str, Any]:
    """Apply the phases of load; return lost requests and the number of replicas over time."""
    rng, requests, samples = np.random.default_rng(1), [], []
    client.sizes.clear()
    started = time.perf_counter()
    for phase in phases:
        rate = phase.rate
        while True:
            offset = time.perf_counter() - started
            part = poisson_requests(rate, phase.seconds, rng)
            samples += await send_open_loop(client.call, part)
            requests += [(offset + at, *rest) for at, *rest in part]
            size = client.sizes[-1]
            if phase.wanted is None or size.replicas == size.nodes == phase.wanted:
                break
            if size.replicas < phase.wanted:
                rate = min(HIGH, RATE_STEP * rate)
            if time.perf_counter() - started > EVENT_TIMEOUT_S:
                raise TimeoutError(f"expected {phase.wanted} replicas and nodes, got {size}")
    seconds = int(time.perf_counter() - started)
    await client.wait_for_size(1)
    await client.wait_for_size(1, nodes=1)
    sizes = [Size(size.at - started, size.replicas, size.nodes) for size in client.sizes]
    return {
        **summarise(samples),
        "most_replicas": max(size.replicas for size in sizes),
        "last_replicas": sizes[-1].replicas,
        "most_nodes": max(size.nodes for size in sizes),
        "last_nodes": sizes[-1].nodes,
        "series": sample_per_second(requests, samples, sizes, seconds),
    }


async def roll(client: BalancingClient, rate: float, seconds: float) -> dict[str, Any]:
    """Replace both of two replicas by a new version under load; return the summary."""
    requests = poisson_requests(rate, seconds, np.random.default_rng(2))
    before = set(client.addresses)
    loading = asyncio.create_task(send_open_loop(client.call, requests))
    await asyncio.sleep(2.0)
    await asyncio.to_thread(deploy, {"num_replicas": 2}, drain_s=19)
    samples = await loading
    await client.wait_for_size(2)
    return {**summarise(samples), "replaced": len(before - set(client.addresses))}


def summarise(samples: Sequence[RequestSample]) -> dict[str, Any]:
    """Return counts, attainment, mean quality and latencies of the samples."""
    answered = [sample for sample in samples if sample.code == "OK"]
    latencies = [sample.latency_s for sample in answered]
    return {
        "requests": len(samples),
        "codes": dict(Counter(sample.code for sample in samples)),
        "lost": len(samples) - len(answered),
        "attainment": round(float(np.mean([sample.met for sample in samples])), 4),
        "quality": round(float(np.mean([sample.quality for sample in answered])), 4),
        "p50_ms": round(1e3 * float(np.median(latencies)), 2),
        "p99_ms": round(1e3 * float(np.quantile(latencies, 0.99)), 2),
        "send_lag_p99_ms": round(
            1e3 * float(np.quantile([sample.send_lag_s for sample in samples], 0.99)), 2
        ),
    }


def sample_per_second(
    requests: Sequence[Any],
    samples: Sequence[RequestSample],
    sizes: Sequence[Size],
    seconds: int,
) -> dict[str, list[float]]:
    """Return one value per second for the plot."""
    out: dict[str, list[float]] = {
        name: [] for name in ("rate", "attainment", "quality", "replicas", "nodes")
    }
    for second in range(seconds):
        inside = [
            s for (at, *_), s in zip(requests, samples, strict=True) if second <= at < second + 1
        ]
        out["rate"].append(len(inside))
        out["attainment"].append(float(np.mean([s.met for s in inside])) if inside else 1.0)
        qualities = [s.quality for s in inside if s.code == "OK"]
        out["quality"].append(float(np.mean(qualities)) if qualities else float("nan"))
        seen = [size for size in sizes if size.at < second + 1]
        out["replicas"].append(seen[-1].replicas if seen else 1)
        out["nodes"].append(seen[-1].nodes if seen else 1)
    return out


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw the series of the scaling run."""
    figure, axes = plt.subplots(5, 1, figsize=(8, 9), sharex=True)
    for axis, (name, values) in zip(axes, found["series"].items(), strict=True):
        axis.step(range(len(values)), values, where="post")
        axis.set_ylabel({"rate": "requests/s"}.get(name, name))
        axis.grid(alpha=0.3)
    axes[1].set_ylim(0, 1.05)
    axes[-1].set_xlabel("seconds")
    figure.suptitle(f"{found['requests']} requests, {found['lost']} lost")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


async def verify(short: bool) -> dict[str, Any]:
    """Return the results of scaling and, unless `short`, of rolling."""
    from ladderstitch.ray_serve.control_actor import control_actor
    from ladderstitch.scheduling.settings import SchedulerSettings

    max_replicas, up_s, down_s = (2, 1.0, 3.0) if short else (3, 2.0, 6.0)
    await asyncio.to_thread(deploy, scaling_options(max_replicas, up_s, down_s))
    client = BalancingClient(control_actor(SchedulerSettings()))
    following = asyncio.create_task(client.follow())
    await client.wait_for_size(1)
    high = await measure_high_rate(client)
    low = LOW_SHARE * high
    if short:
        phases = [Phase(low, 2.0), Phase(high, 4.0, wanted=2), Phase(low, 2.0, wanted=1)]
    else:
        phases = [Phase(low, 20.0), Phase(high, 60.0), Phase(low, 60.0)]
    scaled = await scale(client, phases)
    rolled = {}
    if not short:
        await asyncio.to_thread(deploy, {"num_replicas": 2})
        await client.wait_for_size(2)
        rolled = await roll(client, high / 2, 30.0)
    following.cancel()
    await client.close()
    return {"scale": scaled, "roll": rolled, "retries": client.retries, "goals": GOALS}


def failures(found: dict[str, Any]) -> list[str]:
    """Return a message for each expectation that the results do not meet."""
    messages = [
        f"{name}: {part['lost']} requests lost, {part['codes']}"
        for name in ("scale", "roll")
        if (part := found[name]) and part["lost"]
    ]
    scaled = found["scale"]
    messages += [
        f"{what} did not follow the load"
        for what in ("replicas", "nodes")
        if scaled[f"most_{what}"] < 2 or scaled[f"last_{what}"] != 1
    ]
    if found["roll"] and (found["roll"]["replaced"] < 2 or found["roll"]["requests"] < 500):
        messages.append("the roll replaced fewer than 2 replicas or ran fewer than 500 requests")
    return messages


def main() -> int:
    """Return 1 if an expectation is not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--short", action="store_true", help="only scale to two replicas; write nothing"
    )
    parser.add_argument("--out", type=Path, default=Path("loadtest/results"))
    arguments = parser.parse_args()
    with fake_cluster(max_nodes=2 if arguments.short else 4):
        found = asyncio.run(verify(arguments.short))
    if not arguments.short:
        (arguments.out / "operations.json").write_text(json.dumps(found, indent=1) + "\n")
        plot(found["scale"], arguments.out / "operations.png")
    shown = {name: value for name, value in found["scale"].items() if name != "series"}
    sys.stdout.write(json.dumps({**found, "scale": shown}, indent=1) + "\n")
    for message in (messages := failures(found)):
        sys.stderr.write(f"failed: {message}\n")
    return int(bool(messages))


if __name__ == "__main__":
    sys.exit(main())
