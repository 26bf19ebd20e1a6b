import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mpq
from mpq.cost_models import find_device
from mpq.cost_models.arithmetic import bops, compute_cost
from mpq.cost_models.bit_ops import bit_ops
from mpq.cost_models.devices import Device, Memory, Setting
from mpq.cost_models.energy import DRAM_PJ_PER_BIT, energy, layer_energy, on_chip_bytes, sram_pj_per_bit
from mpq.cost_models.operations import (
    PRODUCTS,
    accumulate,
    float_add,
    float_multiply,
    int_add,
    int_multiply,
    multiply,
    shift,
)
from mpq.cost_models.workload import make_workload
from mpq.errors import BudgetError
from mpq.layers import LayerSpec
from mpq.quantizers import NumberFormat, Scheme, formats, parse_schemes
from mpq.testing import CostContract


@dataclass(frozen=True)
class Number:
    family: str
    bits: int
    exponent: int = 0
    mantissa: int = 0


INT4, INT8, FP16, FP32 = (NumberFormat.parse(n) for n in ("int4", "int8", "fp16", "fp32"))
E4M3 = Number("float", 8, 4, 3)


class TestEnergy(CostContract):
    @pytest.fixture
    def cost_model(self):
        return energy


class TestComputeCost(CostContract):
    @pytest.fixture
    def cost_model(self):
        return compute_cost


class TestBops(CostContract):
    @pytest.fixture
    def cost_model(self):
        return bops


def linear(depth, columns, rows=1):
    shapes = (rows, depth), (rows, columns)
    return LayerSpec(
        "a", "linear", (columns, depth), (columns, depth), *shapes, rows * depth * columns, depth * columns, 1, 0, 0
    )


def test_horowitz_to_a_femtojoule():
    found = [int_multiply(8), int_multiply(32), int_add(32), float_multiply(5, 10), float_multiply(8, 23)]
    np.testing.assert_allclose(found, [0.2, 3.1, 0.1, 1.1, 3.7], atol=1e-3)
    np.testing.assert_allclose([float_add(16), float_add(32)], [0.4, 0.9], atol=1e-3)
    sram = 64 * sram_pj_per_bit(np.array([1, 8, 32, 1024, 10**6]) * 1024)
    np.testing.assert_allclose(sram, [10, 10, 20, 100, 100], atol=1e-3)


def test_products_by_closed_form():
    assert multiply(INT4, INT8) == int_multiply(8)
    assert multiply(INT4, FP16) == float_multiply(5, 10)  # widened to the activation's format
    assert multiply(E4M3, E4M3) > multiply(INT8, INT8)  # a minifloat is dearer than an integer of its width
    pow2 = Number("pow2", 4)
    assert multiply(pow2, INT8) == shift(8, 8) == pytest.approx(int_add(8) / 3 * 3)  # three rows of multiplexers
    assert multiply(pow2, FP16) == int_add(5)
    assert multiply(Number("apot", 5), INT8) == pytest.approx(2 * shift(8, 4) + int_add(13))
    assert multiply(Number("shift_add", 4), INT8) == 4 * int_add(8)
    assert multiply(Number("l_mul", 32, 8, 23), FP32) == int_add(32)
    assert multiply(Number("ternary", 2), INT8) == multiply(Number("binary", 1), INT8) == 0
    assert multiply(Number("mx", 4, 2, 1), Number("mx", 4, 2, 1)) == float_multiply(2, 1) + int_add(8) / 32
    assert multiply(Number("codebook", 4), FP16) == float_multiply(5, 10)


def test_products_of_stored_formats():
    half = float_multiply(5, 10)
    for name in ("nf4", "fp4_bnb", "kmeans_3", "nupes_4"):  # levels are looked up as fp16, whatever they meet
        fmt = NumberFormat.parse(name)
        assert multiply(fmt, INT8) == multiply(fmt, FP16) == multiply(INT8, fmt) == half
        assert accumulate(fmt, INT8, 64) == float_add(32)
    assert multiply(NumberFormat.parse("nvfp4"), NumberFormat.parse("nvfp4")) == (
        float_multiply(2, 1) + float_multiply(4, 3) / 16
    )
    assert multiply(NumberFormat.parse("mxint8"), NumberFormat.parse("mxint8")) == int_multiply(8) + int_add(8) / 32
    assert multiply(NumberFormat.parse("post_4"), INT8) == shift(8, 4)
    assert multiply(INT8, NumberFormat.parse("log2_4:tensor")) == shift(8, 16)  # softmax outputs shift the values
    assert multiply(NumberFormat.parse("pvq_2"), INT8) == int_multiply(8)
    with pytest.raises(BudgetError, match="no energy for products of 'posit'"):
        multiply(INT8, Number("posit", 8))
    with pytest.raises(BudgetError, match="no energy for products of 'posit'"):
        accumulate(Number("posit", 8), INT8, 8)


def test_every_family_has_an_energy():
    assert set(formats._BASE_NAMES) <= set(PRODUCTS)


def test_l_mul_saves_what_its_paper_says():
    """Luo & Sun (2024): 95 % of element-wise products, 80 % of dot products.

    Theirs is an addition of 0.1 pJ for a product of 3.7; with a sum of 0.9 pJ, 1.0 for 4.6.
    """
    l_mul = multiply(Number("l_mul", 32, 8, 23), FP32)
    assert 1 - l_mul / multiply(FP32, FP32) == pytest.approx(1 - 0.1 / 3.7, abs=1e-5)
    add = accumulate(FP32, FP32, 64)
    assert 1 - (l_mul + add) / (multiply(FP32, FP32) + add) == pytest.approx(1 - 1.0 / 4.6, abs=1e-5)


def test_no_arithmetic_is_free():
    """What has no product still accumulates."""
    for family in PRODUCTS:
        weight = Number(family, 8, 4, 3) if family in ("float", "mx", "l_mul") else Number(family, 2)
        assert multiply(weight, INT8) + accumulate(weight, INT8, 64) > 0
    with pytest.raises(BudgetError, match="no energy for products of 'posit' numbers; known: int, float"):
        multiply(Number("posit", 8), INT8)
    with pytest.raises(BudgetError, match="shift-and-add multiplies whole numbers"):
        multiply(Number("shift_add", 4), FP16)


def test_sums_take_the_bits_that_they_need():
    assert accumulate(INT4, INT8, 64) == int_add(4 + 8 + 6)
    assert accumulate(INT4, INT8, 65) == int_add(4 + 8 + 7)
    assert accumulate(INT8, INT8, 2**30) == int_add(32)
    assert accumulate(E4M3, E4M3, 64) == float_add(16)
    assert accumulate(INT4, FP16, 64) == float_add(32)


@pytest.mark.parametrize("family", ["int", "pow2", "apot", "shift_add"])
@given(bits=st.integers(1, 15), other=st.integers(1, 16))
def test_more_bits_never_cost_less(family, bits, other):
    act = Number("int", other)
    assert multiply(Number(family, bits), act) <= multiply(Number(family, bits + 1), act) + 1e-15
    assert multiply(Number(family, bits), act) <= multiply(Number(family, bits), Number("int", other + 1)) + 1e-15


def test_a_layer_by_hand():
    device = Device("mine", "generic", "", (), memory=(Memory("sram", 32768, 1.0), Memory("dram", 1e9, 1.0)))
    assert on_chip_bytes(device) == 32768
    parts = layer_energy(make_workload([linear(100, 40, 3)]), parse_schemes("W4A8,W4"), device)
    near = 20 / 64  # pJ per bit of 32 KB
    weights = 4 * 4000 + 40 * 32
    np.testing.assert_allclose(parts.products[0] * 1e12, [12000 * 0.2, 12000 * 3.7], rtol=1e-4)
    np.testing.assert_allclose(parts.sums[0] * 1e12, [12000 * int_add(4 + 8 + 7), 12000 * 0.9], rtol=1e-4)
    np.testing.assert_allclose(parts.widening[0] * 1e12, [0, 4000 * 3.7], rtol=1e-4)
    np.testing.assert_allclose(parts.weights[0] * 1e12, weights * (near + DRAM_PJ_PER_BIT), rtol=1e-4)
    np.testing.assert_allclose(parts.activations[0] * 1e12, [420 * b * near for b in (8, 32)], rtol=1e-4)
    np.testing.assert_allclose(parts.total, sum(vars(parts).values()))


def test_tensors_that_do_not_fit_go_through_dram():
    device = Device("mine", "generic", "", (), memory=(Memory("sram", 32768, 1.0), Memory("dram", 1e9, 1.0)))
    found = layer_energy(make_workload([linear(8, 40, 1000)]), parse_schemes("W8A8"), device).activations[0, 0]
    expected = (8 * 48000 * 20 / 64 + 8 * 40000 * DRAM_PJ_PER_BIT) * 1e-12  # only the output exceeds 32 KB
    assert found == pytest.approx(expected, rel=1e-4)


def test_embeddings_read_rows_and_multiply_nothing():
    layer = LayerSpec("e", "embedding", (100, 16), (100, 16), (7,), (7, 16), 0, 1600, 1, 1, None)
    parts = layer_energy(make_workload([layer]), parse_schemes("W8A8"), find_device("generic"))
    assert not parts.products.any()
    assert not parts.sums.any()
    stored = (8 * 1600 + 100 * 32) * 7 / 100
    assert parts.weights[0, 0] * 1e12 == pytest.approx(stored * (100 / 64 + DRAM_PJ_PER_BIT), rel=1e-4)


@given(depth=st.integers(1, 600), columns=st.integers(1, 600), rows=st.integers(1, 200))
def test_energy_is_monotone(depth, columns, rows):
    schemes = [Scheme.parse(f"W{w}A{a}") for w in (2, 3, 4, 8) for a in (2, 4, 8)]
    work = make_workload([linear(depth, columns, rows)])
    total = layer_energy(work, schemes, find_device("generic")).total
    grid = total.reshape(4, 3)
    assert (np.diff(grid, axis=0) >= 0).all()
    assert (np.diff(grid, axis=1) >= 0).all()
    twice = make_workload([linear(depth, columns, rows)], Setting(batch=2))
    assert (layer_energy(twice, schemes, find_device("generic")).total > total).all()


def test_ten_thousand_layers_are_quick():
    work = make_workload([linear(64, 64), linear(32, 128)] * 5000)
    schemes = [Scheme.parse(f"W{w}A{a}") for w in (2, 3, 4, 8) for a in (2, 4, 5, 6, 8)]
    start = time.perf_counter()
    layer_energy(work, schemes, find_device("generic"))
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("name", ["zcu104", "bitfusion", "generic"])
def test_every_kind_of_device_has_a_size(name):
    sizes = {"zcu104": 624 * 2304 + 96 * 36864, "bitfusion": 65536 + 32768, "generic": 2**20}
    assert on_chip_bytes(find_device(name)) == sizes[name]


def test_compute_cost_and_bops_by_formula():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(48, 5))
    space = mpq.analyze(net, torch.randn(4, 1, 6, 6), "W3A8,W8A4,W8", progress=False).space
    macs, products = np.array([432, 240]), np.array([9, 48])
    np.testing.assert_array_equal(compute_cost(space).cost, np.outer(macs, [8, 8, 32]))
    assert compute_cost(space).reference == 672 * 32
    per_mac = np.array([24 + 11, 32 + 12, 256 + 40]) + np.log2(products)[:, None]
    np.testing.assert_allclose(bops(space).cost, macs[:, None] * per_mac)
    assert (bops(space).cost > bit_ops(space).cost).all()


def test_a_budget_of_energy_as_a_constraint():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    space = mpq.analyze(net, torch.randn(4, 64), "W2A8,W8A8", progress=False).space
    cost = energy(space)
    limit = cost.total([0, 1])
    constraint = cost.constraint(limit)
    assert constraint.cost[[0, 1], [0, 1], 0].sum() <= constraint.slack_limit[0]
    assert constraint.cost[[0, 1], [1, 1], 0].sum() > constraint.slack_limit[0]
    assert cost.show(limit).endswith("%)")
