"""Where to stitch two ONNX networks: pairs of cuts by predicted cost and similarity of features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ladderstitch.scheduling.requests import Pixels
from ladderstitch.training.affine_fit import AffineFit
from ladderstitch.vision.models.graphs import INPUT
from ladderstitch.vision.networks.maps import MIN_OPSET, Features, aligned_rows, feature_rows
from ladderstitch.vision.networks.probe import Cut, open_quietly
from ladderstitch.vision.networks.scaling import Scaling
from ladderstitch.vision.networks.units import Network

MAX_CANDIDATES = 24
"""Cuts of one network that are compared, evenly spread over its cost."""
MAX_SIDE_RATIO = 2.0
"""Largest ratio between the sides of two grids of features that are joined."""
SAMPLE_SIDE = 4
"""Rows and columns of the grid that features are averaged to when they are compared."""
SAMPLE_DEPTH = 2
"""Size of that grid along the first axis of volumes."""
MARGIN = 0.02
"""Share by which a path must cost more than the cheaper network and less than the other one."""
MAX_ROWS = 100
"""Rows of one image that a map is fitted on, about; neighbours in a grid hardly differ."""
COMPARISON_RIDGE = 1e-2


@dataclass(frozen=True, slots=True)
class Joint:
    """A path from network `front` after the cut `leave` to network `end` after the cut `enter`.

    `macs` are those of the whole path. `similarity` is the share of the variance of the end's
    features that an affine map predicts on images which it was not fitted on, at most 1.
    """

    front: int
    leave: Cut
    end: int
    enter: Cut
    macs: int
    similarity: float = 0.0

    @property
    def ends(self) -> tuple[Features, Features]:
        """The features that the map reads, and those that it replaces."""
        front, end = Features.of(self.leave.shape), Features.of(self.enter.shape)
        assert front is not None
        assert end is not None
        return front, end

    @property
    def rank(self) -> tuple[bool, float]:
        """The order of preference: similarity, but first features that need not be resized.

        Features that are predicted from a coarser grid lack detail that their variance hides.
        """
        front, end = self.ends
        return front.grid == end.grid, self.similarity


class FeatureReader:
    """Features of one network at some of its cuts, for images as the bundle prepares them."""

    def __init__(self, network: Network, scaling: Scaling | None, cuts: Iterable[Cut]) -> None:
        self.names = list(dict.fromkeys(cut.name for cut in cuts))
        self.image = network.flow.images[0]
        self.session: onnxruntime.InferenceSession | None = None
        self.change: onnxruntime.InferenceSession | None = None
        if self.names:
            self.session = open_quietly(network.with_outputs(self.names), network.path)
        if scaling is not None:
            change = scaling.model(network.model, network.opset)
            self.change = open_quietly(change, network.path)

    def read(self, images: Pixels) -> dict[str, NDArray[np.float32]]:
        """Return the features [B, ...] by the names of the cuts."""
        if self.session is None:
            return {}
        if self.change is not None:
            (images,) = self.change.run(None, {INPUT: images})
        return dict(zip(self.names, self.session.run(None, {self.image: images}), strict=True))


def candidate_cuts(network: Network) -> list[Cut]:
    """Return the cuts at which a network may be stitched, at most `MAX_CANDIDATES`, in order.

    Of cuts with no product between them only the last is one, such as the sum at the end of a block
    after its activation.
    """
    found = {
        cut.macs: cut
        for cut in network.info.cuts
        if 0 < cut.macs < network.info.macs and Features.of(cut.shape) is not None
    }
    cuts = list(found.values())
    if len(cuts) <= MAX_CANDIDATES or network.opset < MIN_OPSET:
        return cuts if network.opset >= MIN_OPSET else []
    places = np.linspace(0, len(cuts) - 1, MAX_CANDIDATES).round().astype(int)
    return [cuts[place] for place in places]


def list_joints(networks: Sequence[Network]) -> list[Joint]:
    """Return every path from a network to the next more expensive one whose cost is between both.

    The networks are in order of their cost.
    """
    joints = []
    cuts = [candidate_cuts(network) for network in networks]
    for front in range(len(networks) - 1):
        end = front + 1
        low = networks[front].info.macs * (1 + MARGIN)
        high = networks[end].info.macs * (1 - MARGIN)
        for leave in cuts[front]:
            for enter in cuts[end]:
                macs = _path_macs(leave, enter, networks[end].info.macs)
                if macs is not None and low <= macs <= high:
                    joints.append(Joint(front, leave, end, enter, macs))
    return joints


def _path_macs(leave: Cut, enter: Cut, end_macs: int) -> int | None:
    """Return the multiply-accumulates of a path; None if no map leads from one cut to the other."""
    x, y = Features.of(leave.shape), Features.of(enter.shape)
    if x is None or y is None or not x.can_map_to(y):
        return None
    if x.grid is not None and y.grid is not None:
        ratios = [max(a, b) / min(a, b) for a, b in zip(x.grid, y.grid, strict=True)]
        if max(ratios) > MAX_SIDE_RATIO:
            return None
    return leave.macs + x.map_macs(y) + end_macs - enter.macs


def compare(
    joints: Sequence[Joint],
    networks: Sequence[Network],
    scalings: Sequence[Scaling | None],
    batches: Iterable[Pixels],
) -> list[Joint]:
    """Return the joints with their similarities.

    Features are averaged over parts of the image. A map is fitted on every other image and judged
    on the rest.
    """
    readers = _open_readers(joints, networks, scalings)
    samples: list[dict[str, list[Tensor]]] = [{name: [] for name in r.names} for r in readers]
    for images in batches:
        for reader, sample in zip(readers, samples, strict=True):
            for name, values in reader.read(images).items():
                sample[name].append(_sample(values))
    whole = [{name: torch.cat(rows) for name, rows in sample.items()} for sample in samples]
    return [_with_similarity(joint, whole) for joint in joints]


def _open_readers(
    joints: Sequence[Joint], networks: Sequence[Network], scalings: Sequence[Scaling | None]
) -> list[FeatureReader]:
    """Return the reader of each network for the cuts that the joints need."""
    used: list[list[Cut]] = [[] for _ in networks]
    for joint in joints:
        used[joint.front].append(joint.leave)
        used[joint.end].append(joint.enter)
    parts = zip(networks, scalings, used, strict=True)
    return [FeatureReader(network, scaling, cuts) for network, scaling, cuts in parts]


def _sample(values: NDArray[np.float32]) -> Tensor:
    """Return features [B, R, D] at R places of each image."""
    features = Features.of(values.shape[1:])
    assert features is not None
    rows = feature_rows(values, features).reshape(len(values), features.rows, features.width)
    if features.grid is None:
        places = np.linspace(0, features.rows - 1, min(SAMPLE_SIDE**2, features.rows))
        return rows[:, places.round().astype(int)]
    maps = rows.transpose(1, 2).reshape(len(values), features.width, *features.grid)
    if len(features.grid) == 2:
        pooled = F.adaptive_avg_pool2d(maps, SAMPLE_SIDE)
    else:
        pooled = F.adaptive_avg_pool3d(maps, (SAMPLE_DEPTH, SAMPLE_SIDE, SAMPLE_SIDE))
    return pooled.flatten(2).transpose(1, 2)


def _with_similarity(joint: Joint, samples: Sequence[dict[str, Tensor]]) -> Joint:
    x, y = samples[joint.front][joint.leave.name], samples[joint.end][joint.enter.name]
    fit, check = (AffineFit(x.shape[-1], y.shape[-1]) for _ in range(2))
    for sums, start in ((fit, 0), (check, 1 if len(x) > 1 else 0)):
        sums.add(x[start::2].flatten(0, 1), y[start::2].flatten(0, 1))
    similarity = check.explained(*fit.solve(COMPARISON_RIDGE))
    return Joint(joint.front, joint.leave, joint.end, joint.enter, joint.macs, similarity)


def best_joints(joints: Sequence[Joint], count: int) -> list[Joint]:
    """Return at most `count` joints: the most similar one of each range of costs, by cost.

    The ranges of a pair of networks are equally wide and share `count` between the pairs. Joints of
    equal fronts and ends are compared with each other only, since deep features are harder to
    predict than early ones whatever the quality of the path.
    """
    pairs = sorted({(joint.front, joint.end) for joint in joints})
    chosen: list[Joint] = []
    for number, pair in enumerate(pairs):
        own = [joint for joint in joints if (joint.front, joint.end) == pair]
        share = count // len(pairs) + (number < count % len(pairs))
        chosen += _best_by_cost(own, share)
    return sorted(chosen, key=lambda joint: joint.macs)


def _best_by_cost(joints: Sequence[Joint], count: int) -> list[Joint]:
    if not count:
        return []
    low, high = min(j.macs for j in joints), max(j.macs for j in joints)
    best: dict[int, Joint] = {}
    for joint in joints:
        place = min(int((joint.macs - low) * count / max(high - low, 1)), count - 1)
        if place not in best or joint.rank > best[place].rank:
            best[place] = joint
    rest = sorted(set(joints) - set(best.values()), key=lambda j: (j.rank, -j.macs), reverse=True)
    return [*best.values(), *rest[: count - len(best)]]


def fit_maps(
    joints: Sequence[Joint],
    networks: Sequence[Network],
    scalings: Sequence[Scaling | None],
    batches: Iterable[Pixels],
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Return weight [D_end, D_front] and bias [D_end] of each joint, fitted without labels."""
    readers = _open_readers(joints, networks, scalings)
    fits = [AffineFit(front.width, end.width) for front, end in (joint.ends for joint in joints)]
    for number, images in enumerate(batches):
        read = [reader.read(images) for reader in readers]
        for joint, fit in zip(joints, fits, strict=True):
            x = aligned_rows(read[joint.front][joint.leave.name], *joint.ends)
            y = feature_rows(read[joint.end][joint.enter.name], joint.ends[1])
            step = max(1, joint.ends[1].rows // MAX_ROWS)
            fit.add(x[number % step :: step], y[number % step :: step])
    solved = [fit.solve() for fit in fits]
    return [(weight.float().numpy(), bias.float().numpy()) for weight, bias in solved]
