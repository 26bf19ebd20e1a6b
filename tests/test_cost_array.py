import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq.cost_models import find_device
from mpq.cost_models.array import array_cycles, fusion_factor
from mpq.cost_models.devices import Memory, Setting
from mpq.cost_models.latency import layer_times
from mpq.cost_models.workload import make_workload
from mpq.layers import LayerSpec
from mpq.quantizers import Scheme, parse_schemes

ARRAYS = ("haq-cloud", "bismo-pynq-z1", "bismo-ultra96", "bitfusion", "eyeriss")
BITS = (2, 4, 8)


def conv(name, cin, cout, size, kernel=1, groups=1):
    weight = (cout, cin // groups, kernel, kernel)
    macs = cout * size * size * cin // groups * kernel**2
    shapes = (cin, size, size), (cout, size, size)
    return LayerSpec(name, "conv2d", weight, weight, *shapes, macs, int(np.prod(weight)), 1, 0, 0)


EMBEDDING = LayerSpec("embed", "embedding", (100, 16), (100, 16), (7,), (7, 16), 0, 1600, 1, 1, None)
LAYERS = [conv("wide", 40, 70, 6), conv("stem", 3, 16, 12, 3), conv("depthwise", 48, 48, 7, 3, 48), EMBEDDING]


@pytest.fixture
def fidelity(load_benchmark):
    return load_benchmark("fidelity_accelerators")


@pytest.mark.parametrize(
    "name",
    [
        "HAQ table",
        "HAQ depthwise layers",
        "HAQ strategy",
        "Bit Fusion",
        "Horowitz and QKeras energies",
        "FINN units",
    ],
)
def test_published_figures(fidelity, name):
    if not (fidelity.SHARED / "reference").is_dir():
        pytest.skip("no reference figures in ../shared")
    rows = fidelity.COMPARISONS[name]()
    assert rows
    for row in rows:
        assert row.met, row


def test_units_worked_out_by_hand_need_no_reference(fidelity):
    assert all(row.met for row in fidelity.finn_units() + fidelity.bit_fusion())


def by_loops(layer, scheme, device):
    """Cycles counted tile by tile: the slow, obvious twin of `array_cycles`."""
    f, w, a = device.figures, scheme.weight.bits, scheme.activation.bits
    groups = layer.input_shape[0] // layer.rows_shape[1]
    columns, depth = layer.rows_shape[0] // groups, int(np.prod(layer.rows_shape[1:]))
    together = max(1, min(groups, f["columns"] // columns))
    passes = w * a if f["arithmetic"] == "serial" else 1
    take = f["depth"] * (int(fusion_factor(w, a)) if f["arithmetic"] == "fused" else 1)
    cycles = 0
    for _ in range(0, int(np.prod(layer.output_shape[1:])), f["positions"]):
        for _ in range(0, groups, together):
            for _ in range(0, columns * together, f["columns"]):
                for _ in range(0, depth * together, take):
                    cycles += passes
    return cycles


@pytest.mark.parametrize("name", ARRAYS)
def test_cycles_equal_a_loop_over_tiles(name):
    device, schemes = find_device(name), parse_schemes("W2A2,W4A8,W8A4,W8A8")
    found = array_cycles(make_workload(LAYERS), schemes, device)
    assert found[:3].tolist() == [[by_loops(x, s, device) for s in schemes] for x in LAYERS[:3]]
    assert not found[3].any()


def test_depthwise_layers_of_a_bit_serial_array_are_linear_in_activation_bits():
    work = make_workload([LAYERS[2]], Setting(batch=4))
    times = layer_times(work, parse_schemes("W8A2,W8A4,W8A8,W2A8"), find_device("haq-cloud")).total[0]
    np.testing.assert_allclose(times / times[0], [1, 2, 4, 4])


def test_fixed_width_gains_traffic_only():
    parts = layer_times(make_workload(LAYERS), parse_schemes("W2A2,W8A8"), find_device("eyeriss"))
    np.testing.assert_array_equal(parts.compute[:, 0], parts.compute[:, 1])
    assert (parts.memory[:, 0] < parts.memory[:, 1]).all()


def test_operands_that_do_not_fit_are_read_again():
    device = find_device("bitfusion")
    layer = conv("big", 256, 512, 28)
    weights, inputs, outputs = 512 * 256, 256 * 28 * 28, 512 * 28 * 28
    found = layer_times(make_workload([layer]), [Scheme.parse("W8A8")], device).memory[0, 0]
    by_hand = min(weights + 2 * inputs, inputs + 7 * weights) + outputs  # 131 of 64 KB, 200.7 of 32 KB
    assert found == pytest.approx(by_hand / 12e9)


def test_embeddings_move_the_rows_that_they_look_up():
    found = layer_times(make_workload([EMBEDDING]), [Scheme.parse("W8A8")], find_device("bitfusion"))
    assert found.total[0, 0] == pytest.approx(2 * 7 * 16 / 12e9)


@pytest.mark.parametrize("name", ARRAYS)
@given(
    cin=st.integers(1, 300),
    cout=st.integers(1, 300),
    size=st.integers(1, 20),
    kernel=st.sampled_from([1, 3]),
    depthwise=st.booleans(),
)
def test_monotone(name, cin, cout, size, kernel, depthwise):
    """In the bits of both operands, in the batch, and against the bandwidth."""
    cout = cin if depthwise else cout
    layers = [conv("layer", cin, cout, size, kernel, cin if depthwise else 1), EMBEDDING]
    device = find_device(name)
    schemes = [Scheme.parse(f"W{w}A{a}") for w in BITS for a in BITS]
    times = layer_times(make_workload(layers), schemes, device).total.reshape(-1, 3, 3)
    assert (times > 0).all()
    assert (np.diff(times, axis=1) >= -1e-15).all()
    assert (np.diff(times, axis=2) >= -1e-15).all()
    twice = layer_times(make_workload(layers, Setting(batch=2)), schemes, device).total
    assert (twice.reshape(times.shape) >= times).all()
    (dram,) = device.memory
    faster = replace(device, memory=(Memory(dram.name, dram.size_bytes, 2 * dram.bandwidth),))
    assert (layer_times(make_workload(layers), schemes, faster).total.reshape(times.shape) <= times).all()


@pytest.mark.parametrize("name", ARRAYS)
def test_ten_thousand_layers_are_quick(name):
    schemes = [Scheme.parse(f"W{w}A{a}") for w in (2, 3, 4, 8) for a in (2, 4, 5, 6, 8)]
    work = make_workload(LAYERS * 2500)
    start = time.perf_counter()
    found = layer_times(work, schemes, find_device(name))
    assert time.perf_counter() - start < 1
    assert found.total.shape == (10_000, 20)


def test_pairs_without_a_kernel_are_absent():
    device = find_device("bitfusion")
    assert not device.supports(Scheme.parse("W3A8"))
    assert not device.supports(Scheme.parse("W4"))  # no float activations
