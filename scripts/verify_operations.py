"""Scale and roll a real deployment on Ray under open-loop load, and count what is lost.

Replicas take free ports; the load balances over those that are registered and goes to another one
on UNAVAILABLE, as gRPC clients do by their retry policy. Writes figures and a plot.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from fake_nodes import fake_cluster, nodes
from matplotlib import pyplot as plt

from ladderstitch.client import infer_request
from ladderstitch_loadtest.load.open_loop import BudgetClass, Sample, open_loop, poisson

APP = "ladderstitch"
METHOD = "/ladderstitch.v1.InferenceService/Infer"
BUDGET = BudgetClass("all", 100_000)
HIGH = 150.0
"""Requests a second, on a machine that is fast enough for them."""
LOW_SHARE = 0.1
UTILISATION = 0.2
"""Largest share of its time that one replica may be busy at `HIGH`."""
EVENT_S = 600.0
"""Longest wait for a replica or node, on the slowest machine."""
GOALS = {"quality": 0.915, "busy": 0.03}
"""A low share of busy time, so that two cores, load generator included, show all of it."""
ATTEMPTS = 8


@dataclass(frozen=True)
class Phase:
    """Load of one rate for `seconds`, repeated until there are so many replicas and nodes."""

    rate: float
    seconds: float
    wanted: int | None = None


@dataclass(frozen=True)
class Size:
    """Of the deployment, at a time."""

    at: float
    replicas: int
    nodes: int


@dataclass
class ReplicaPool:
    """The replicas that are registered, as a client sees them."""

    control: Any
    addresses: list[str] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)
    retries: int = 0
    turn: Any = field(default_factory=itertools.count)

    async def refresh(self) -> None:
        registered = await self.control.registered.remote()
        self.addresses = sorted(registered.values())
        now = await asyncio.to_thread(nodes)
        self.sizes.append(Size(time.perf_counter(), len(self.addresses), now))
        self.changed.set()

    async def follow(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(0.1)

    async def call(self, message: bytes) -> bytes:
        """The answer of one replica, or of another if that one goes."""
        for attempt in range(ATTEMPTS):
            try:
                answer: bytes = await self._channel()(message, timeout=EVENT_S)
                return answer
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE or attempt == ATTEMPTS - 1:
                    raise
                self.retries += 1
                await asyncio.sleep(0.02 * 2**attempt)
        raise AssertionError("the last attempt raises")

    def _channel(self) -> Any:
        address = self.addresses[next(self.turn) % len(self.addresses)]
        if address not in self.channels:
            self.channels[address] = grpc.aio.insecure_channel(address)
        return self.channels[address].unary_unary(METHOD)

    async def close(self) -> None:
        for channel in self.channels.values():
            await channel.close()


def deploy(replicas: dict[str, Any], **args: Any) -> None:
    """What `serve deploy FILE` does."""
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


def scaling(most: int, up_s: float, down_s: float) -> dict[str, Any]:
    """As the chart writes it, at a quicker pace."""
    return {
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": most,
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


async def until(fleet: ReplicaPool, replicas: int, nodes: int | None = None) -> None:
    """Wait for so many replicas, and nodes; raises `TimeoutError`."""
    async with asyncio.timeout(EVENT_S):
        while len(fleet.addresses) != replicas or nodes not in (None, fleet.sizes[-1].nodes):
            fleet.changed.clear()
            await fleet.changed.wait()


def requests_at(rate: float, seconds: float, rng: np.random.Generator) -> list[Any]:
    """(time, class, message) of Poisson load."""
    out = []
    for at in poisson(rate, seconds, rng):
        pixels = rng.integers(0, 256, (1, 1, 28, 28), np.uint8)
        message = infer_request(pixels, budget_s=BUDGET.budget_us / 1e6).SerializeToString()
        out.append((at, BUDGET, message))
    return out


async def high_rate(fleet: ReplicaPool) -> float:
    """Requests a second that this machine can take: `HIGH` or, on a slow one, less."""
    took = []
    for _, _, message in requests_at(rate=HIGH, seconds=1.0, rng=np.random.default_rng(0))[:50]:
        started = time.perf_counter()
        await fleet.call(message)
        took.append(time.perf_counter() - started)
    return min(HIGH, UTILISATION / float(np.median(took)))


async def scale(fleet: ReplicaPool, phases: Sequence[Phase]) -> dict[str, Any]:
    """Load rises and falls; what was lost, and how many replicas there were meanwhile."""
    rng, requests, samples = np.random.default_rng(1), [], []
    fleet.sizes.clear()
    started = time.perf_counter()
    for phase in phases:
        while True:
            offset = time.perf_counter() - started
            part = requests_at(phase.rate, phase.seconds, rng)
            samples += await open_loop(fleet.call, part)
            requests += [(offset + at, *rest) for at, *rest in part]
            size = fleet.sizes[-1]
            if phase.wanted is None or size.replicas == size.nodes == phase.wanted:
                break
            if time.perf_counter() - started > EVENT_S:
                raise TimeoutError(f"expected {phase.wanted} replicas and nodes, got {size}")
    seconds = int(time.perf_counter() - started)
    await until(fleet, 1)
    await until(fleet, 1, nodes=1)
    sizes = [Size(size.at - started, size.replicas, size.nodes) for size in fleet.sizes]
    return {
        **summary(samples),
        "most_replicas": max(size.replicas for size in sizes),
        "last_replicas": sizes[-1].replicas,
        "most_nodes": max(size.nodes for size in sizes),
        "last_nodes": sizes[-1].nodes,
        "series": series(requests, samples, sizes, seconds),
    }


async def roll(fleet: ReplicaPool, rate: float, seconds: float) -> dict[str, Any]:
    """Both of two replicas are replaced by a new version under load."""
    requests = requests_at(rate, seconds, np.random.default_rng(2))
    before = set(fleet.addresses)
    loading = asyncio.create_task(open_loop(fleet.call, requests))
    await asyncio.sleep(2.0)
    await asyncio.to_thread(deploy, {"num_replicas": 2}, drain_s=19)
    samples = await loading
    await until(fleet, 2)
    return {**summary(samples), "replaced": len(before - set(fleet.addresses))}


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
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


def series(
    requests: Sequence[Any],
    samples: Sequence[Sample],
    sizes: Sequence[Size],
    seconds: int,
) -> dict[str, list[float]]:
    """A value a second."""
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
    from ladderstitch.ray_serve.control_actor import live_control
    from ladderstitch.scheduling.settings import SchedulerSettings

    most, up_s, down_s = (2, 1.0, 3.0) if short else (3, 2.0, 6.0)
    await asyncio.to_thread(deploy, scaling(most, up_s, down_s))
    fleet = ReplicaPool(live_control(SchedulerSettings()))
    following = asyncio.create_task(fleet.follow())
    await until(fleet, 1)
    high = await high_rate(fleet)
    low = LOW_SHARE * high
    if short:
        phases = [Phase(low, 2.0), Phase(high, 4.0, wanted=2), Phase(low, 2.0, wanted=1)]
    else:
        phases = [Phase(low, 20.0), Phase(high, 60.0), Phase(low, 60.0)]
    scaled = await scale(fleet, phases)
    rolled = {}
    if not short:
        await asyncio.to_thread(deploy, {"num_replicas": 2})
        await until(fleet, 2)
        rolled = await roll(fleet, high / 2, 30.0)
    following.cancel()
    await fleet.close()
    return {"scale": scaled, "roll": rolled, "retries": fleet.retries, "goals": GOALS}


def failures(found: dict[str, Any]) -> list[str]:
    """What a deployment that scales and rolls well would not show."""
    wrong = [
        f"{name}: {part['lost']} requests lost, {part['codes']}"
        for name in ("scale", "roll")
        if (part := found[name]) and part["lost"]
    ]
    scaled = found["scale"]
    wrong += [
        f"{what} did not follow the load"
        for what in ("replicas", "nodes")
        if scaled[f"most_{what}"] < 2 or scaled[f"last_{what}"] != 1
    ]
    if found["roll"] and (found["roll"]["replaced"] < 2 or found["roll"]["requests"] < 500):
        wrong.append("the roll replaced too little, or under too little load")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--short", action="store_true", help="only scaling to two replicas; writes nothing"
    )
    parser.add_argument("--out", type=Path, default=Path("loadtest/results"))
    arguments = parser.parse_args()
    with fake_cluster(most=2 if arguments.short else 4):
        found = asyncio.run(verify(arguments.short))
    if not arguments.short:
        (arguments.out / "operations.json").write_text(json.dumps(found, indent=1) + "\n")
        plot(found["scale"], arguments.out / "operations.png")
    shown = {name: value for name, value in found["scale"].items() if name != "series"}
    sys.stdout.write(json.dumps({**found, "scale": shown}, indent=1) + "\n")
    for line in (wrong := failures(found)):
        sys.stderr.write(f"failed: {line}\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
