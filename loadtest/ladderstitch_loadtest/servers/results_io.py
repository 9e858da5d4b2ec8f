"""Result files: the figures of a measurement, with the machine that it ran on."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from ladderstitch.runtime.device import device_name, versions


def write(folder: Path | None, name: str, figures: dict[str, Any]) -> None:
    """Write NAME.json into the folder, which is created if needed; do nothing without a folder.

    A figure that is NaN, because it was not measured, is written as null.
    """
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    load = [round(value, 2) for value in os.getloadavg()]
    machine = {"device": device_name(torch.device("cpu")), "load_average": load} | versions()
    text = json.dumps({"machine": machine} | _replace_nan(figures), indent=1)
    (folder / f"{name}.json").write_text(text + "\n")


def _replace_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replace_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
