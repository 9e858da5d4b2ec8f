"""What the networks of a family return: class scores, or tensors by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ladderstitch.errors import ConfigError
from ladderstitch.importers.image_settings import ImageSettings
from ladderstitch.vision.networks.outputs import SERVED_TYPES, OutputEntry
from ladderstitch.vision.networks.units import Network

OutputChoice = Literal["auto", "scores", "tensors"]
"""How outputs are served; `auto` takes one tensor [batch, K] for class scores."""
MAX_OUTPUTS = 64
EMBEDDINGS = frozenset(
    {"image_embeds", "pooler_output", "embedding", "embeddings", "sentence_embedding"}
)
"""Names of outputs that libraries give to one vector per image that is no class scores."""
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FamilyOutputs:
    """Labels, the outputs of a family (none if it classifies), and each network's names of them."""

    labels: tuple[str, ...]
    entries: tuple[OutputEntry, ...] = ()
    names: tuple[tuple[str, ...], ...] = ()


def find_outputs(
    networks: Sequence[Network], settings: Sequence[ImageSettings], choice: OutputChoice
) -> FamilyOutputs:
    """Return what all networks of a family return.

    One tensor [batch, K] or [batch, K, 1, 1] is class scores, unless `choice` is `tensors`, or its
    name is in `EMBEDDINGS` and there are not K known labels. Otherwise an output is class scores at
    each of its places if the number of labels is known and equals its first size, or if `choice` is
    `scores` and it is the only output. Raises `ConfigError` if the networks do not return the same.
    """
    orders = [_order_like(networks[-1], network) for network in networks]
    _check_same_shapes(networks, orders)
    last = networks[-1]
    shapes = [last.info.outputs[name] for name in orders[-1]]
    if len(shapes) > MAX_OUTPUTS:
        raise ConfigError(f"{last.path}: expected at most {MAX_OUTPUTS} outputs, got {len(shapes)}")
    known = [s.labels for s in settings if s.labels is not None]
    labels = known[-1] if known else None
    first = shapes[0]
    if len(shapes) == 1 and _is_classifier(last, orders[-1][0], labels, choice):
        return FamilyOutputs(_labels_of(first[0], labels))
    if choice == "scores" and (len(shapes) != 1 or len(first) < 1):
        raise ConfigError(
            f"{last.path}: expected one output of class scores, got {len(shapes)}: {shapes}"
        )
    if choice == "scores":
        labels = _labels_of(first[0], labels)
    entries = tuple(
        OutputEntry(
            name=name,
            shape=shape,
            kind="scores" if _has_classes(shape, labels, choice) else "tensor",
            data_type=SERVED_TYPES[last.info.output_types[name]],
        )
        for name, shape in zip(orders[-1], shapes, strict=True)
    )
    has_scores = any(entry.kind == "scores" for entry in entries)
    return FamilyOutputs(labels if labels and has_scores else (), entries, tuple(orders))


def _is_classifier(
    network: Network, name: str, labels: tuple[str, ...] | None, choice: OutputChoice
) -> bool:
    """Return whether the only output of a network is one class score per label."""
    shape = network.info.outputs[name]
    is_vector = len(shape) >= 1 and all(size == 1 for size in shape[1:])
    is_float = SERVED_TYPES[network.info.output_types[name]] == "FP32"
    if not is_vector or not is_float or choice == "tensors":
        return False
    is_embedding = name in EMBEDDINGS and (labels is None or len(labels) != shape[0])
    return choice == "scores" or not is_embedding


def _has_classes(shape: Shape, labels: tuple[str, ...] | None, choice: OutputChoice) -> bool:
    return bool(labels and choice != "tensors" and shape[:1] == (len(labels),))


def _labels_of(count: int, known: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the labels of the classes, which are numbers if no file has their names."""
    labels = known if known is not None else tuple(f"class {i}" for i in range(count))
    if len(labels) != count:
        raise ConfigError(
            f"labels: expected {count} from the network, got {len(labels)}; --outputs tensors "
            "serves outputs that are no class scores"
        )
    return labels


def _order_like(last: Network, network: Network) -> tuple[str, ...]:
    """Return a network's outputs in the order of another's if both have the same names."""
    names = tuple(last.flow.outputs)
    own = tuple(network.flow.outputs)
    return names if set(names) == set(own) else own


def _check_same_shapes(networks: Sequence[Network], orders: Sequence[tuple[str, ...]]) -> None:
    """Raise `ConfigError` unless all networks return tensors of equal shapes and types."""
    described = [
        [
            f"{SERVED_TYPES[network.info.output_types[name]]} {list(network.info.outputs[name])}"
            for name in names
        ]
        for network, names in zip(networks, orders, strict=True)
    ]
    for network, own in zip(networks, described, strict=True):
        if own != described[-1]:
            raise ConfigError(
                f"outputs: expected the same for all networks, got {str(own)[:200]} for "
                f"{network.path.name} and {str(described[-1])[:200]} for {networks[-1].path.name}"
            )
