import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.cost_models import all_devices, find_device
from mpq.cost_models.devices import Device, Kernel, Memory, load_device
from mpq.cost_models.latency import layer_times
from mpq.cost_models.roofline import Shapes
from mpq.cost_models.workload import make_workload
from mpq.errors import FormatError
from mpq.layers import LayerSpec
from mpq.quantizers import NumberFormat, Scheme

PROFILES = [d for d in all_devices().values() if d.kind in ("cpu", "dsp")]
W8A8 = Scheme.parse("W8A8")


def linear(out, depth, tokens=1):
    shape = (depth,) if tokens == 1 else (tokens, depth)
    return LayerSpec(
        "fc",
        "linear",
        (out, depth),
        (out, depth),
        shape,
        (*shape[:-1], out),
        tokens * out * depth,
        out * depth,
        1,
        0,
        0,
    )


def conv(out, channels, kernel, side, groups=1, calls=1):
    weight = (out, channels // groups, kernel, kernel)
    macs = math.prod(weight) * side * side * calls
    return LayerSpec(
        "conv",
        "conv2d",
        weight,
        weight,
        (channels, side, side),
        (out, side, side),
        macs,
        math.prod(weight),
        calls,
        0,
        0,
    )


def embedding(rows, width, tokens):
    return LayerSpec(
        "embed", "embedding", (rows, width), (rows, width), (tokens,), (tokens, width), 0, rows * width, 1, 0, None
    )


layers = st.one_of(
    st.builds(linear, st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 300)),
    st.builds(conv, st.integers(1, 600), st.integers(1, 600), st.sampled_from([1, 3, 5]), st.integers(1, 60)),
    st.integers(2, 900).flatmap(
        lambda c: st.builds(conv, st.just(c), st.just(c), st.just(3), st.integers(1, 60), st.just(c))
    ),
    st.builds(embedding, st.integers(1, 5000), st.integers(1, 500), st.integers(1, 300)),
)


def toy(**figures):
    """1e9 int8 and 1e8 float MACs per second; 1,000 bytes of fast memory."""
    curves = [
        {"weight": f, "activation": f, "op": o, "efficiency": 0.5}
        for f in ("int8", "fp32")
        for o in ("conv", "depthwise", "matmul")
    ]
    kernels = (
        Kernel("int8", "int8", 1e9),
        Kernel("fp32", "float", 1e8),
        Kernel("int4", "int8", None, ("int8", "int8"), 1e7),
        Kernel("int2", "int2", None, ("int8", "int8")),
    )
    memory = Memory("l1", 1000, 1e7), Memory("dram", math.inf, 1e6)
    return Device(
        "toy",
        "cpu",
        "toy",
        kernels,
        "fp32",
        memory,
        {"curves": curves, "packed_ops": ["matmul"], **figures},
        {"a": "b"},
    )


def times(device, layer, *schemes):
    return layer_times(make_workload([layer], device.setting), [Scheme.parse(s) for s in schemes], device)


def test_a_product_by_hand():
    found = times(toy(), linear(10, 20, tokens=3), "W8A8", "W4A8", "W2A2")
    weights = np.array([8 * 200 + 32 * 10, 4 * 200 + 32 * 10, 2 * 200 + 32 * 10]) / 8  # scales of each channel
    moved = weights + 3 * 20 + 3 * 10  # activations are bytes for all three: the arithmetic's
    np.testing.assert_allclose(found.compute[0], 600 / 0.5e9)
    np.testing.assert_allclose(found.memory[0], moved / 1e7)
    np.testing.assert_allclose(found.widening[0], [0, 200 / 1e7, 0])
    np.testing.assert_allclose(found.total[0], np.maximum(found.compute[0] + found.widening[0], found.memory[0]))


def test_larger_layers_come_from_the_outer_memory():
    found = times(toy(), linear(10, 200), "W8A8")
    np.testing.assert_allclose(found.memory[0, 0], (2000 + 40 + 200 + 10) / 1e6)
    placed = times(toy(weights_from="l1"), linear(10, 200), "W8A8")
    np.testing.assert_allclose(placed.memory[0, 0], (2000 + 40) / 1e7 + 210 / 1e7)
    with pytest.raises(FormatError, match="weights_from: 'l9' is none of its memory: l1, dram"):
        times(toy(weights_from="l9"), linear(10, 200), "W8A8")


def test_convolutions_by_hand():
    curve = {
        "weight": "int8",
        "activation": "int8",
        "efficiency": 1.0,
        "columns": 16,
        "gather": 1e-6,
        "pack": 1e-8,
        "output": 1e-7,
    }
    dense = {**curve, "op": "conv", "channels": 8, "overhead": 1e-3}
    device = toy(curves=[dense, {**curve, "op": "depthwise", "tail": 10.0}])
    found = times(device, conv(20, 12, 3, 4, calls=2), "W8A8")  # 20 -> 32 columns, 12 -> 16 channels
    np.testing.assert_allclose(found.compute[0, 0], 2 * 16 * 32 * 16 * 9 / 1e9)
    around = 16 * 9 * 1e-6 + 16 * 108 * 1e-8 + 320 * 1e-7 + 1e-3
    np.testing.assert_allclose(found.overhead[0, 0], 2 * around)
    image = times(device, conv(16, 3, 3, 4), "W8A8")  # three channels have a kernel of their own
    np.testing.assert_allclose(image.compute[0, 0], 16 * 16 * 27 / 1e9)
    tail = times(device, conv(18, 18, 3, 4, groups=18), "W8A8")  # 16 in a vector, two one by one
    np.testing.assert_allclose(tail.compute[0, 0], 16 * 9 * (16 + 2 * 10) / 1e9)


def test_weights_of_convolutions_are_widened_when_they_are_loaded():
    wide, narrow = times(toy(), conv(8, 8, 3, 2), "W8A8", "W4A8").memory[0]
    assert narrow == wide


def test_an_embedding_reads_what_it_looks_up():
    found = times(toy(), embedding(1000, 10, 4), "W32")
    assert found.compute[0, 0] == 0
    np.testing.assert_allclose(found.memory[0, 0], (4 * 40 + 4 * 4 + 4 * 40) / 1e7)


@given(layers, st.sampled_from(["int4", "int8:tensor", "int3:g32", "int4:g128:asym", "fp16", "int8:tensor:asym"]))
def test_stored_bytes_are_those_of_the_format(layer, name):
    fmt = NumberFormat.parse(name)
    assert Shapes(make_workload([layer])).stored_bytes(fmt)[0] == pytest.approx(fmt.storage_bits(layer.rows_shape) / 8)


def schemes_of(device):
    """A scheme for each kernel."""
    return [
        Scheme.parse(f"W{k.weight}" + ("" if k.activation == "float" else f"A{k.activation}")) for k in device.kernels
    ]


@pytest.mark.parametrize("device", PROFILES, ids=lambda d: d.name)
class TestProfiles:
    @settings(max_examples=30, deadline=None)
    @given(layer=layers, batch=st.integers(1, 16))
    def test_every_kernel_has_a_time_that_rises_with_batch_and_falls_with_bandwidth(self, device, layer, batch):
        schemes = schemes_of(device)
        base, larger, faster = (
            layer_times(make_workload([layer], d.setting), schemes, d)
            for d in (
                device.at(batch=batch),
                device.at(batch=batch + 1),
                replace(
                    device.at(batch=batch), memory=tuple(replace(m, bandwidth=2 * m.bandwidth) for m in device.memory)
                ),
            )
        )
        assert np.isfinite(base.total).all()
        assert (base.total > 0).all()
        assert (larger.total >= base.total * (1 - 1e-12)).all()
        assert (faster.total <= base.total * (1 + 1e-12)).all()

    @settings(max_examples=30, deadline=None)
    @given(layer=layers)
    def test_weights_in_fewer_bits_gain_no_arithmetic_and_never_move_more(self, device, layer):
        """Kernels of one activation format whose products run in the same formats."""
        found = layer_times(make_workload([layer]), schemes_of(device), device)
        for i, a in enumerate(device.kernels):
            for j, b in enumerate(device.kernels):
                same = (a.runs_as or (a.weight, a.activation)) == (b.runs_as or (b.weight, b.activation))
                if same and a.activation == b.activation and a.weight in ("int2", "int4") and b.weight == "int8":
                    assert found.compute[0, i] == found.compute[0, j]
                    assert found.memory[0, i] <= found.memory[0, j] * (1 + 1e-12)

    def test_every_figure_has_a_source(self, device):
        assert {"peak", "kernels", "memory", *device.figures} <= set(device.sources)
        assert ("widen" in device.sources) == any(k.widen for k in device.kernels)

    def test_ten_thousand_layers_take_less_than_a_second(self, device):
        rng = np.random.default_rng(0)
        many = [linear(*(int(n) for n in rng.integers(1, 4000, 3))) for _ in range(10_000)]
        work = make_workload(many)
        kinds = schemes_of(device)
        started = time.process_time()
        layer_times(work, (kinds * 20)[:20], device)
        assert time.process_time() - started < 1


def test_int4_weights_gain_where_reading_them_is_what_takes_time():
    device = find_device("x86_vnni")
    one, many = linear(4096, 4096), linear(4096, 4096, tokens=512)
    assert times(device, one, "W4").total < 0.6 * times(device, one, "W32").total
    assert times(device, many, "W4").total >= times(device, many, "W32").total * 0.99
    assert times(device, many, "W4A8").total >= times(device, many, "W8A8").total


def test_matrix_instructions_multiply_faster():
    big = linear(4096, 4096, tokens=512)
    amx, vnni = (times(find_device(n), big, "W8A8").total[0, 0] for n in ("x86_amx", "x86_vnni"))
    i8mm, sdot = (times(find_device(n), big, "W8A8").total[0, 0] for n in ("cortex_a720", "cortex_a76"))
    assert 3 < vnni / amx < 8
    assert 1.5 < sdot / i8mm < 3


def test_a_dsp_streams_what_its_memory_does_not_hold():
    curves = [{"weight": "int8", "activation": "int8", "op": "matmul", "efficiency": 1.0}]
    memory = Memory("vtcm", 1000, 1e9), Memory("dram", math.inf, 1e6)
    kernels = (Kernel("int8", "int8", 1e15),)
    device = Device("toy", "dsp", "toy", kernels, "fp16", memory, {"curves": curves, "packed_ops": []}, {"a": "b"})
    weights = 10 * 40 + 4 * 10
    held = times(device, linear(10, 40, tokens=8), "W8A8")  # 320 + 80 bytes stay in half of it
    np.testing.assert_allclose(held.memory, weights / 1e6)
    split = times(device, linear(10, 40, tokens=100), "W8A8")  # weights stay, inputs pass once
    np.testing.assert_allclose(split.memory, (weights + 4000 + 1000) / 1e6)
    both = times(device, linear(100, 40, tokens=100), "W8A8")  # 4,400 bytes of weights in nine pieces, inputs in eight
    np.testing.assert_allclose(both.memory, (min(4400 + 9 * 4000, 8 * 4400 + 4000) + 10_000) / 1e6)


def test_hexagon_promotes_what_it_can_not_multiply():
    device = find_device("hexagon_690")
    layer = conv(64, 64, 3, 28)
    w4a8, w8a8, w4a16, w16a16 = times(device, layer, "W4A8", "W8A8", "W4Aint16", "Wint16Aint16").total[0]
    assert w4a8 == w8a8
    assert w4a16 == w16a16
    assert 2 < w16a16 / w8a8 < 5
    packed = times(find_device("hexagon_htp"), linear(4096, 4096), "W4A8", "W8A8").total[0]
    assert packed[0] < 0.6 * packed[1]
    assert not device.supports(Scheme.parse("W3A8"))


def test_profiles_are_checked_field_by_field(tmp_path):
    path = tmp_path / "mine.json"
    curve = {"weight": "int8", "activation": "int8", "op": "conv", "efficiency": 1}
    profile = {
        "schema": "mpq/device-1",
        "name": "mine",
        "kind": "cpu",
        "description": "mine",
        "kernels": [{"weight": "int8", "activation": "int8", "peak": 1e9}],
        "memory": [{"name": "dram", "bandwidth": 1e9}],
        "figures": {"packed_ops": [], "curves": [curve]},
        "sources": {"all": "me"},
    }
    path.write_text(json.dumps(profile))
    with pytest.raises(FormatError, match=r"no row for matmul in int8 x int8; add one"):
        layer_times(make_workload([linear(2, 2)]), [W8A8], load_device(path))
    for wrong, message in (
        ({"efficiency": 2}, "figures.curves.0.efficiency"),
        ({"speed": 3}, "'speed' was unexpected"),
    ):
        profile["figures"]["curves"] = [curve | wrong]
        path.write_text(json.dumps(profile))
        with pytest.raises(FormatError, match=message):
            load_device(path)


def test_a_kernel_without_a_peak_is_an_error():
    device = replace(toy(), kernels=(Kernel("int8", "int8"),))
    with pytest.raises(FormatError, match="no peak for int8 x int8"):
        times(device, linear(2, 2), "W8A8")
