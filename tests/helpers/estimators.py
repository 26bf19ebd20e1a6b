"""What tests of estimators share: networks, schemes, and calls that leave the random state as it was."""

from __future__ import annotations

import torch

from mpq.losses import KLLoss
from mpq.testing import tiny_networks
from mpq.view import preserved_state

NETWORKS = tiny_networks()
SCHEMES = "W2A4,W4A8"


def run(estimator, setup, loss=KLLoss(), **options):  # noqa: B008 - frozen
    view, space, calib, bank = setup
    with preserved_state(0):
        return estimator(view, space, calib, bank, loss, progress=False, **options)


def full_pass(view, batch):
    with preserved_state(0), torch.no_grad():
        return view(batch)
