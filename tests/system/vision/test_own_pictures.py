"""Pictures of one's own in folders: trained, served and predicted with the folders' names."""

from __future__ import annotations

from pathlib import Path

import yaml
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.client import Client
from tests.support.coloured_pictures import RECIPE, write_pictures
from tests.support.servers import start_server, stop_server

NAMES = {"red": "tomato", "green": "lime", "blue": "sky"}


def test_trained_on_folders_served_and_predicted_by_their_names(tmp_path: Path) -> None:
    photos = write_pictures(tmp_path / "photos", 12, names=NAMES)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    bundle = tmp_path / "mine"
    command = ["train", str(tmp_path / "recipe.yaml"), "--data", str(photos), "--into", str(bundle)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    server = start_server(bundle, tmp_path / "log")
    try:
        with Client(server.address) as client:
            unseen = write_pictures(tmp_path / "unseen", 2, names=NAMES, seed=1)
            for picture in sorted(unseen.rglob("*.png")):
                answer = client.predict(picture.read_bytes(), min_quality=0.8)
                assert answer.label == picture.parent.name
    finally:
        assert stop_server(server) == 0
