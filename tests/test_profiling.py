"""Measured kernels and profiles fitted to them; the fit is tested on times that a known device makes."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from mpq.cost_models import find_device
from mpq.cost_models.cpu import layer_times
from mpq.cost_models.kernels import _conv_attributes, measurable, measure
from mpq.cost_models.latency import layer_times as any_times
from mpq.cost_models.profiling import (
    Measurement,
    fit_profile,
    load_measurements,
    measure_layers,
    predict,
    profile_model,
    save_measurements,
    write_profile,
)
from mpq.cost_models.workload import make_workload
from mpq.errors import DataError, FormatError, GraphError
from mpq.layers import LayerSpec
from mpq.profile_cli import profile
from mpq.quantizers import Scheme


def linear(out, depth, tokens=1):
    shapes = (depth,) if tokens == 1 else (tokens, depth)
    size = out * depth
    return LayerSpec(
        "fc", "linear", (out, depth), (out, depth), shapes, (*shapes[:-1], out), tokens * size, size, 1, 0, 0
    )


def conv(out, channels, kernel, side, stride=1, groups=1, pad=None):
    weight = (out, channels // groups, kernel, kernel)
    end = (side + 2 * (kernel // 2 if pad is None else pad) - kernel) // stride + 1
    size = int(np.prod(weight))
    return LayerSpec(
        f"c{out}", "conv2d", weight, weight, (channels, side, side), (out, end, end), size * end * end, size, 1, 0, 0
    )


LAYERS = [
    *(
        conv(o, c, k, s)
        for o, c, k, s in [(64, 3, 7, 112), (64, 64, 3, 56), (128, 64, 1, 28), (24, 72, 1, 56), (40, 240, 1, 14)]
    ),
    *(conv(c, c, k, s, groups=c) for c, k, s in [(64, 3, 56), (72, 3, 28), (120, 5, 28), (480, 3, 14), (672, 5, 7)]),
    *(
        linear(o, d, t)
        for o, d, t in [(768, 768, 128), (3072, 768, 197), (1000, 2048, 1), (512, 512, 4), (4096, 4096, 1)]
    ),
]


def made_up(scheme):
    """Times that x86_vnni would take."""
    device = find_device("x86_vnni")
    times = layer_times(make_workload(LAYERS), [Scheme.parse(scheme)], device).total[:, 0]
    return [Measurement(x, scheme, float(t)) for x, t in zip(LAYERS, times, strict=True) if measurable(x, scheme)]


@pytest.mark.slow
def test_a_fit_finds_a_device_again(tmp_path):
    measured = made_up("W32") + made_up("W8A8") + made_up("W4:g32")
    path = tmp_path / "m.json"
    save_measurements(measured, path)
    assert load_measurements(path) == measured
    device = write_profile(fit_profile(measured, "again"), tmp_path / "p.json")
    error = np.abs(np.array(predict(device, measured)) / [m.seconds for m in measured] - 1)
    assert np.median(error) < 0.02
    assert error.max() < 0.3
    assert re.search(r"median error on them \d", device.sources["kernels"])
    others = [linear(1024, 1024, 64), conv(96, 96, 3, 28)]  # shapes it was not fitted to
    for scheme in (Scheme.parse("W32"), Scheme.parse("W8A8")):
        here, there = (any_times(make_workload(others), [scheme], d).total for d in (device, find_device("x86_vnni")))
        np.testing.assert_allclose(here, there, rtol=0.15)


def test_outliers_do_not_move_a_fit(tmp_path):
    measured = made_up("W32")
    spoiled = [replace(m, seconds=m.seconds * 20) if i == 1 else m for i, m in enumerate(measured)]
    device = write_profile(fit_profile(spoiled), tmp_path / "p.json")
    error = np.abs(np.array(predict(device, measured)) / [m.seconds for m in measured] - 1)
    assert np.median(error) < 0.1


def test_a_fit_needs_float_kernels():
    with pytest.raises(DataError, match="a profile needs W32 kernels"):
        fit_profile(made_up("W8A8"))


@pytest.mark.parametrize(
    ("layer", "strides", "pads"),
    [
        (conv(8, 3, 7, 224, 2), [2, 2], 5),
        (conv(8, 8, 3, 56), [1, 1], 2),
        (conv(8, 3, 16, 224, 16, pad=0), [16, 16], 0),
        (conv(8, 8, 3, 7, pad=0), [1, 1], 0),
        (conv(64, 3, 11, 224, 4, pad=2), [4, 4], 3),
    ],
)
def test_strides_and_paddings_follow_from_shapes(layer, strides, pads):
    found = _conv_attributes(layer)
    assert found["strides"] == strides
    assert found["pads"][0] + found["pads"][2] == pads
    for i in range(2):
        padded = layer.input_shape[1 + i] + found["pads"][i] + found["pads"][i + 2]
        assert (padded - layer.rows_shape[2 + i]) // strides[i] + 1 == layer.output_shape[1 + i]


class TestKernels:
    """Needs onnxruntime."""

    @pytest.fixture(autouse=True)
    def _runtime(self):
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")

    @pytest.mark.parametrize("scheme", ["W32", "W8A8", "W4:g32"])
    @pytest.mark.parametrize(
        "layer", [linear(64, 96, 5), conv(16, 8, 3, 12, 2), conv(8, 8, 3, 9, groups=8)], ids=["linear", "conv", "dw"]
    )
    def test_every_kernel_is_measured_or_refused(self, layer, scheme):
        if measurable(layer, scheme):
            assert 1e-7 < measure(layer, scheme, 0.01) < 0.1
        else:
            with pytest.raises(GraphError, match=f"no W4:g32 kernel for '{layer.name}'"):
                measure(layer, scheme, 0.01)

    def test_more_work_takes_longer(self):
        small, large = (measure(linear(256, 256, t), "W32", 0.02) for t in (4, 256))
        assert large > 5 * small

    def test_a_shape_is_measured_once(self):
        twin = replace(linear(64, 96, 5), name="twin")
        found = measure_layers([linear(64, 96, 5), twin], seconds=0.01)
        assert [m.scheme for m in found] == ["W32", "W8A8", "W4:g32"]

    def test_the_command_writes_a_device(self, tmp_path):
        app = typer.Typer()
        app.command()(profile)
        (tmp_path / "net.py").write_text(
            "import torch\nfrom torch import nn\n"
            "def net():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 32))\n"
            "def data():\n    return [torch.zeros(2, 3, 6, 6)]\n"
        )
        out = tmp_path / "mine.json"
        arguments = [
            f"{tmp_path}/net.py:net",
            "--calib",
            f"{tmp_path}/net.py:data",
            "--out",
            str(out),
            "--seconds",
            "0.01",
        ]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert json.loads(out.read_text())["name"] == "this_cpu"
        assert find_device(str(out)).kernel(Scheme.parse("W8A8")).peak > 1e6
        wrong = CliRunner().invoke(app, [*arguments, "--device", "gpu"])
        assert "this machine's cpu" in str(wrong.exception)


def test_a_name_is_checked_before_anything_is_measured(tmp_path):
    with pytest.raises(FormatError, match="'My CPU' is no name for a device"):
        profile_model(None, None, tmp_path / "p.json", name="My CPU")


def test_what_is_no_profile_is_not_written(tmp_path):
    with pytest.raises(FormatError, match=r"p\.json: "):
        write_profile({"schema": "mpq/device-1"}, tmp_path / "p.json")
    assert not (tmp_path / "p.json").exists()


def test_dilated_convolutions_are_left_out_and_named(tmp_path, monkeypatch):
    """Their shapes are those of another kernel: here of a stride that no shape leads to."""
    measured = []

    def measure_one(layer, scheme, seconds):
        measured.append(layer.name)
        return 1e-3

    monkeypatch.setattr("mpq.cost_models.profiling.require", lambda *_: None)
    monkeypatch.setattr("mpq.cost_models.profiling.measure", measure_one)
    monkeypatch.setattr("mpq.cost_models.profiling.fit_profile", lambda *_: {})
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, dilation=2))
    with (
        pytest.warns(UserWarning, match="not measured, as they are dilated: 1$"),
        pytest.raises(FormatError),  # an empty profile
    ):
        profile_model(net, torch.randn(1, 2, 8, 8), tmp_path / "p.json")
    assert set(measured) == {"0"}
