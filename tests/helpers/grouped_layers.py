"""A network with convolutions in groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Grouped(nn.Module):
    """Convolutions in groups, transposed ones, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.grouped = nn.Conv2d(16, 24, 3, stride=2, groups=4)
        self.up = nn.ConvTranspose2d(24, 12, 3, 2, groups=2)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.first(x).relu()).relu()
        x = self.up(self.grouped(x).relu()).relu()
        out: Tensor = self.fc(x.mean((2, 3)))
        return out
