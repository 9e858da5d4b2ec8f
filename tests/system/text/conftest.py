"""Language models to generate with: a tiny one, and one that has two paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from ladderstitch.text.bundle import TextBundle, TextVariant
from ladderstitch.text.model.residual import ResidualScheme
from tests.support.language_models import write_tiny

PATHS = (
    TextVariant(name="standard", residual=ResidualScheme()),
    TextVariant(name="ladder-2", residual=ResidualScheme(scheme="ladder", ladder_layers=2)),
)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> TextBundle:
    """One path."""
    return TextBundle.load(write_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def two_paths(tmp_path_factory: pytest.TempPathFactory) -> TextBundle:
    """Standard (quality 0.6) and ladder in the last two layers (0.5)."""
    path: Path = tmp_path_factory.mktemp("models") / "two"
    return TextBundle.load(write_tiny(path, paths=PATHS))
