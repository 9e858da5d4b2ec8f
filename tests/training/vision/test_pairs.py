"""Tests of streamed least squares, and of the choice of joints between two networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ladderstitch.errors import DataError
from ladderstitch.training.affine_fit import AffineFit
from ladderstitch.training.vision.pairs import (
    Joint,
    best_joints,
    candidate_cuts,
    compare,
    fit_maps,
    list_joints,
)
from ladderstitch.training.vision.stitching_layers import solve_affine
from ladderstitch.vision.networks.maps import feature_rows
from ladderstitch.vision.networks.units import Network
from tests.support.onnx_networks import SHAPE, random_images, run, write_network


def test_streamed_fit_equals_least_squares_on_all_rows() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, 7, generator=rng) + 3
    y = x @ torch.randn(7, 4, generator=rng) + torch.randn(400, 4, generator=rng)
    fit = AffineFit(7, 4)
    for start in range(0, 400, 64):
        fit.add(x[start : start + 64], y[start : start + 64])
    weight, bias = fit.solve(0)
    expected_weight, expected_bias = solve_affine(x, y)
    torch.testing.assert_close(weight.float(), expected_weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bias.float(), expected_bias, atol=1e-4, rtol=1e-4)
    residual = y.double() - x.double() @ weight.T - bias
    share = 1 - residual.square().sum() / (y - y.mean(0)).double().square().sum()
    assert fit.explained(weight, bias) == pytest.approx(float(share), abs=1e-6)
    assert fit.num_rows == 400


def test_fit_of_repeated_and_constant_features_is_finite() -> None:
    x = torch.randn(50, 1).repeat(1, 3)
    x[:, 2] = 1
    fit = AffineFit(3, 2)
    fit.add(x, torch.ones(50, 2))
    weight, bias = fit.solve()
    torch.testing.assert_close(x.double() @ weight.T + bias, torch.ones(50, 2).double())


def test_fit_of_features_that_are_not_finite_is_rejected() -> None:
    fit = AffineFit(1, 1)
    fit.add(torch.tensor([[float("nan")]]), torch.ones(1, 1))
    with pytest.raises(DataError, match="expected finite numbers"):
        fit.solve()


@pytest.fixture
def networks(tmp_path: Path) -> list[Network]:
    """Return two networks of one kind, the smaller one first."""
    paths = [write_network(tmp_path, "convnext", size) for size in (4, 8)]
    return [Network(path, SHAPE) for path in paths]


def test_joints_cost_between_both_networks(networks: list[Network]) -> None:
    joints = list_joints(networks)
    assert joints
    low, high = (network.info.macs for network in networks)
    assert all(low < joint.macs < high for joint in joints)
    assert {joint.leave for joint in joints} <= set(candidate_cuts(networks[0]))
    macs = [cut.macs for cut in candidate_cuts(networks[0])]
    assert macs == sorted(set(macs))


def test_equal_networks_are_entirely_similar(networks: list[Network], tmp_path: Path) -> None:
    cut = candidate_cuts(networks[0])[1]
    joint = Joint(0, cut, 1, cut, 1)
    batches = [random_images(8, seed) for seed in range(2)]
    (compared,) = compare([joint], [networks[0]] * 2, [None, None], batches)
    assert compared.similarity > 0.99
    ((weight, bias),) = fit_maps([joint], [networks[0]] * 2, [None, None], batches)
    features = run(networks[0].unit(None, cut.name, None), batches[0])
    rows = feature_rows(features, joint.ends[0]).numpy()
    np.testing.assert_allclose(rows @ weight.T + bias, rows, atol=1e-2)


def test_best_joints_are_spread_over_the_costs(networks: list[Network]) -> None:
    cuts = candidate_cuts(networks[0])
    joints = [Joint(0, cuts[0], 1, cuts[0], macs, macs % 7 / 7) for macs in range(100, 200)]
    chosen = best_joints(joints, 5)
    assert len(chosen) == 5
    assert [joint.macs // 20 for joint in chosen] == [5, 6, 7, 8, 9]
    assert all(joint.macs % 7 == 6 for joint in chosen)
    assert best_joints(joints, 0) == []
    assert best_joints(joints[:3], 10) == joints[:3]


def test_best_joints_are_shared_between_pairs_of_networks(networks: list[Network]) -> None:
    cuts = candidate_cuts(networks[0])
    joints = [Joint(0, cuts[0], 1, cuts[0], macs, 0.5) for macs in range(10)]
    joints += [replace(joint, front=1, end=2, macs=joint.macs + 50) for joint in joints]
    chosen = best_joints(joints, 5)
    assert [joint.front for joint in chosen] == [0, 0, 0, 1, 1]


def test_features_that_need_no_resizing_are_preferred(networks: list[Network]) -> None:
    early, late = candidate_cuts(networks[0])[0], candidate_cuts(networks[0])[-1]
    assert early.shape[-1] != late.shape[-1]
    resized, equal = Joint(0, early, 1, late, 5, 0.9), Joint(0, late, 1, late, 5, 0.4)
    assert best_joints([resized, equal], 1) == [equal]
    assert best_joints([resized], 1) == [resized]
