"""Affine maps by least squares whose sums are accumulated: memory does not grow with the data."""

from __future__ import annotations

import torch
from torch import Tensor

from ladderstitch.errors import DataError

RIDGE = 1e-6
"""Share of the mean square of a feature that is added to the squares, for features that repeat."""


class AffineFit:
    """The sums X'X and X'Y of rows x [N, D_front] and y [N, D_end], in float64."""

    def __init__(self, front_width: int, end_width: int) -> None:
        self.xx = torch.zeros(front_width + 1, front_width + 1, dtype=torch.float64)
        self.xy = torch.zeros(front_width + 1, end_width, dtype=torch.float64)
        self.yy = torch.zeros(end_width, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows."""
        design = torch.cat((x.double(), torch.ones(len(x), 1, dtype=torch.float64)), dim=1)
        target = y.double()
        self.xx += design.T @ design
        self.xy += design.T @ target
        self.yy += target.square().sum(0)

    @property
    def num_rows(self) -> int:
        """The number of rows added."""
        return int(self.xx[-1, -1])

    def solve(self, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
        """Return weight [D_end, D_front] and bias [D_end], in float64.

        They minimise |x W' + b - y|^2 plus a penalty on W, relative to the mean square of the
        centred features. The means are removed first, so that the bias has no penalty. Raises
        `DataError` if a row was NaN or infinite.
        """
        if not (self.xx.isfinite().all() and self.xy.isfinite().all()):
            raise DataError("features: expected finite numbers, got NaN or infinity")
        count = self.xx[-1, -1]
        mean_x, mean_y = self.xx[-1, :-1] / count, self.xy[-1] / count
        xx = self.xx[:-1, :-1] - count * torch.outer(mean_x, mean_x)
        xy = self.xy[:-1] - count * torch.outer(mean_x, mean_y)
        scale = xx.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        penalty = ridge * scale * torch.eye(len(xx), dtype=torch.float64)
        weight = torch.linalg.solve(xx + penalty, xy).T
        return weight, mean_y - weight @ mean_x

    def explained(self, weight: Tensor, bias: Tensor) -> float:
        """Return the share of the variance of y that the map explains, at most 1, on these rows."""
        solution = torch.cat((weight, bias[:, None]), dim=1).T
        error = (
            self.yy.sum() - 2 * (solution * self.xy).sum() + (solution * (self.xx @ solution)).sum()
        )
        variance = self.yy.sum() - (self.xy[-1] / self.xx[-1, -1]).square().sum() * self.xx[-1, -1]
        return float(1 - error / variance.clamp_min(torch.finfo(torch.float64).tiny))
