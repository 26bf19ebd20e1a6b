"""A real trained network with real data, shipped with mpq: ResNet-20 on Fashion-MNIST."""

from __future__ import annotations

import io
from importlib import resources

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from mpq.bundled.resnet20 import ResNet20

Batches = list[tuple[Tensor, Tensor]]

# Mean and standard deviation of the training images, as the network was trained.
_MEAN, _STD = 0.2860, 0.3530


def resnet20() -> ResNet20:
    """The trained network in evaluation mode (272,186 parameters)."""
    model = ResNet20()
    model.load_state_dict(load_safetensors(_file("resnet20_fashion_mnist.safetensors")))
    return model.eval()


def calibration(batch_size: int = 64) -> Batches:
    """512 images of the training split as (images, labels) batches; mpq does not look at the labels."""
    return _batches("calib", batch_size)


def evaluation(batch_size: int = 250) -> Batches:
    """2,000 images of the test split as (images, labels) batches."""
    return _batches("test", batch_size)


def load_example() -> tuple[ResNet20, Batches, Batches]:
    """Model, calibration batches and labelled test batches.

    Example:
        >>> model, calib, test = load_example()
        >>> len(calib), sum(len(y) for _, y in test)
        (8, 2000)
    """
    return resnet20(), calibration(), evaluation()


def _batches(part: str, batch_size: int) -> Batches:
    with np.load(io.BytesIO(_file("fashion_mnist.npz")), allow_pickle=False) as arrays:
        images, labels = torch.from_numpy(arrays[f"{part}_x"]), torch.from_numpy(arrays[f"{part}_y"])
    x = (images[:, None].float() / 255 - _MEAN) / _STD
    return list(zip(torch.split(x, batch_size), torch.split(labels.long(), batch_size), strict=True))


def _file(name: str) -> bytes:
    return resources.files("mpq.bundled").joinpath(name).read_bytes()
