import json
import math
import time
from dataclasses import replace
from importlib import resources
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mpq
from mpq.cost_models import all_devices, find_device
from mpq.cost_models import finn as unit
from mpq.cost_models.devices import load_device
from mpq.cost_models.fpga import RESOURCES, dsp_packing, layer_times, pipeline, usable
from mpq.cost_models.latency import latency
from mpq.cost_models.workload import make_workload
from mpq.errors import BudgetError, FormatError
from mpq.layers import LayerSpec
from mpq.quantizers import Scheme, parse_schemes
from mpq.space import make_space
from mpq.trace import trace_model
from mpq.units import si

BOARDS = ("zcu102", "zcu104", "u250", "pynq-z1", "pynq-z2")


def linear(name, depth, columns, rows=1):
    shapes = (rows, depth), (rows, columns)
    return LayerSpec(
        name, "linear", (columns, depth), (columns, depth), *shapes, rows * depth * columns, depth * columns, 1, 0, 0
    )


def depthwise(name, channels, size):
    weight, shape = (channels, 1, 3, 3), (channels, size, size)
    return LayerSpec(name, "conv2d", weight, weight, shape, shape, 9 * channels * size * size, 9 * channels, 1, 0, 0)


EMBEDDING = LayerSpec("embed", "embedding", (100, 16), (100, 16), (7,), (7, 16), 0, 1600, 1, 1, None)


@pytest.mark.parametrize(
    ("width", "words", "blocks"),
    [
        (1, 65536, 4),
        (2, 32768, 4),
        (4, 16384, 4),
        (8, 8192, 4),
        (16, 1024, 1),
        (16, 1025, 2),
        (40, 512, 2),
        (40, 513, 3),
    ],
)
def test_block_rams_by_shape(width, words, blocks):
    """One memory of 18 Kb is 16K x 1, 8K x 2, 4K x 4, 2K x 9, 1K x 18 or 512 x 36."""
    assert float(unit.unit_bram18(1, 1, words, 1, width)) == blocks


def test_uram_and_cycles_by_hand():
    assert float(unit.unit_urams(2, 3, 4097 * 6, 1, 13)) == 2 * 2  # 78 bits wide, 4,097 deep
    assert float(unit.unit_cycles(4, 9, 27, 32, 100)) == 8 * 3 * 100
    assert float(unit.unit_dsps(4, 9, 25, 24)) == 36 * 2
    assert float(unit.packed_dsps(5, 9, 4)) == 18


def test_luts_of_a_wide_unit_grow_by_what_a_product_takes():
    for dsp in (True, False):
        one, more = (float(unit.unit_luts(1000, q, 1 << 20, 1000, 4, 6, dsp=dsp)) for q in (64, 65))
        assert more - one == pytest.approx(1000 * float(unit.luts_per_mac(4, 6, dsp=dsp)), abs=1)


def test_packing():
    device = find_device("zcu102")
    assert dsp_packing([4, 2, 4, 8, 1], [4, 3, 5, 8, 8], device).tolist() == [4, 4, 2, 2, 2]
    assert dsp_packing(8, 8, find_device("pynq-z1")) == 1  # DSP48E1: too narrow for two


def test_limits_of_a_board():
    assert usable(find_device("pynq-z2")) == {"luts": 37240, "dsps": 176, "bram18": 224, "urams": 0}


@pytest.mark.parametrize(("scheme", "limit"), list(product(["W2A2", "W4A4", "W8A8"], [700, 1300, 3000])))
def test_pipeline_is_as_fast_as_exhaustive_search_finds(scheme, limit):
    """Two small layers on a tiny device: every pair of divisors, multipliers and memories is tried."""
    scheme, layers = Scheme.parse(scheme), [linear("a", 12, 8, 5), linear("b", 8, 6, 5)]
    figures = {
        **find_device("zcu104").figures,
        **{"luts": limit, "dsps": 6, "bram18": 3, "urams": 1},
        "usable": dict.fromkeys(RESOURCES, 1),
    }
    device = replace(find_device("zcu104"), figures=figures)
    best = math.inf
    options = [list(_built(x, scheme, device)) for x in layers]
    for (one, used), (two, more) in product(*options):
        if all(x + y <= figures[r] for r, x, y in zip(RESOURCES, used, more, strict=True)):
            best = min(best, max(one, two))
    if best == math.inf:
        with pytest.raises(BudgetError, match=r"the smallest pipeline takes \d+% of the luts"):
            pipeline(make_workload(layers), [scheme] * 2, device)
        return
    found = pipeline(make_workload(layers), [scheme] * 2, device)
    assert found.interval * figures["clock_hz"] == pytest.approx(best)


def _built(layer, scheme, device):
    """Cycles and resources of every way to build one layer."""
    w, a = scheme.weight.bits, scheme.activation.bits
    columns, depth = layer.rows_shape
    for pe, simd in product(range(1, columns + 1), range(1, depth + 1)):
        if columns % pe or depth % simd:
            continue
        shape = (pe, simd, depth, columns)
        for dsp, memory in product((False, True), RESOURCES[:1] + RESOURCES[2:]):
            luts = unit.unit_luts(*shape, w, a, dsp=dsp, lutram=memory == "luts")
            dsps = unit.packed_dsps(pe, simd, dsp_packing(w, a, device)) if dsp else 0
            bram = unit.unit_bram18(*shape, w) if memory == "bram18" else 0
            uram = unit.unit_urams(*shape, w) if memory == "urams" else 0
            yield float(unit.unit_cycles(*shape, layer.output_shape[0])), tuple(map(float, (luts, dsps, bram, uram)))


def test_pipeline_is_consistent():
    layers = [linear("a", 256, 128, 49), depthwise("b", 64, 14), linear("c", 512, 100)]
    schemes = parse_schemes("W4A4,W8A8,W2A4")
    device = find_device("zcu104")
    p = pipeline(make_workload(layers), schemes, device)
    depths, columns, positions = [256, 9, 512], [128, 64, 100], [49, 196, 1]
    np.testing.assert_array_equal(p.cycles, unit.unit_cycles(p.pe, p.simd, depths, columns, positions))
    assert all(n % k == 0 for n, k in zip(columns, p.pe, strict=True))
    assert all(n % k == 0 for n, k in zip(depths, p.simd, strict=True))
    assert all(p.resources[r].sum() <= p.limits[r] for r in RESOURCES)
    assert p.interval == p.cycles.max() / 2e8
    assert p.latency == p.cycles.sum() / 2e8
    w, a = [4, 8, 2], [4, 8, 4]
    luts = unit.unit_luts(
        *(p.pe, p.simd, depths, columns, w, a),
        dsp=np.array(p.multipliers) == "dsps",
        lutram=np.array(p.weights_in) == "luts",
    )
    np.testing.assert_array_equal(p.resources["luts"], luts)


def test_fewer_bits_or_more_chip_give_faster_pipelines():
    work = make_workload([linear(str(i), 64 * i, 64 * i + 64, 10) for i in range(1, 9)])
    slow = pipeline(work, [Scheme.parse("W8A8")] * 8, find_device("zcu104"))
    fast = pipeline(work, [Scheme.parse("W2A2")] * 8, find_device("zcu104"))
    large = pipeline(work, [Scheme.parse("W8A8")] * 8, find_device("u250"))
    assert fast.interval < slow.interval
    assert large.interval < slow.interval
    share = layer_times(work, [Scheme.parse("W8A8")], find_device("zcu104")).total.sum()
    assert share <= slow.interval < 3 * share  # the parts add up to what ideal folding would reach


def test_weights_that_do_not_fit_are_reported():
    with pytest.raises(BudgetError, match=r"the smallest pipeline takes \d+% of the \w+ that pynq-z1 has for it"):
        pipeline(make_workload([linear("a", 4096, 4096)]), [Scheme.parse("W8A8")], find_device("pynq-z1"))
    with pytest.raises(BudgetError, match=r"'embed' \(embedding\) has no matrix-vector unit; skip it"):
        pipeline(make_workload([EMBEDDING]), [Scheme.parse("W8A8")], find_device("zcu104"))


def test_rate_of_a_device_by_hand():
    """ZCU102, int8: 2,016 DSPs do 4,032 products with 35.2 LUTs each; the rest of 191,856 LUTs at 123.2 a product."""
    work = make_workload([linear("a", 100, 100, 3)])
    rate = 4032 + (191856 - 4032 * 35.2) / 123.2
    found = layer_times(work, [Scheme.parse("W8A8")], find_device("zcu102"))
    assert found.total[0, 0] == pytest.approx(30000 / rate / 2e8)
    assert found.bound_by(0, 0) == "compute"


def test_embeddings_are_read_from_dram():
    found = layer_times(make_workload([EMBEDDING]), [Scheme.parse("W4A8")], find_device("pynq-z1"))
    assert found.total[0, 0] == pytest.approx(7 * 16 * 4 / 8 / 2.1e9)


@pytest.mark.parametrize("board", BOARDS)
@given(depth=st.integers(1, 500), columns=st.integers(1, 500), rows=st.integers(1, 100))
def test_monotone(board, depth, columns, rows):
    schemes = [Scheme.parse(f"W{w}A{a}") for w in range(1, 9) for a in range(1, 9)]
    times = layer_times(make_workload([linear("a", depth, columns, rows)]), schemes, find_device(board)).total
    grid = times.reshape(8, 8)
    assert (np.diff(grid, axis=0) >= -1e-18).all()
    assert (np.diff(grid, axis=1) >= -1e-18).all()
    more = layer_times(make_workload([linear("a", depth, columns, rows + 1)]), schemes, find_device(board)).total
    assert (more > times).all()


def test_ten_thousand_layers_are_quick():
    work = make_workload([linear("a", 64, 64), depthwise("b", 8, 4)] * 5000)
    schemes = [Scheme.parse(f"W{w}A{a}") for w in (2, 3, 4, 8) for a in (2, 4, 5, 6, 8)]
    start = time.perf_counter()
    layer_times(work, schemes, find_device("zcu102"))
    assert time.perf_counter() - start < 1


def test_latency_of_a_network_is_the_sum_of_its_parts():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    with pytest.warns(UserWarning, match="left out, without a kernel on zcu104: W4"):
        space = mpq.analyze(net, torch.randn(4, 1, 6, 6), "W4A4,W8A8,W4", device="zcu104", progress=False).space
    cost = latency(space)
    parts = layer_times(make_workload(space.layers), space.schemes, find_device("zcu104")).total
    assert cost.total([0, 1]) == parts[0, 0] + parts[1, 1]
    assert (cost.cost[:, 0] < cost.cost[:, 1]).all()


def test_profiles_say_where_their_figures_come_from():
    kinds = {d.name: d.kind for d in all_devices().values()}
    assert {kinds[b] for b in BOARDS} == {"fpga"}
    for name in BOARDS:
        device = find_device(name)
        assert {"kernels", "memory", "figures.luts", "figures.usable"} <= set(device.sources)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("figures", "luts"), -1, r"figures\.luts: -1 is less"),
        (("figures", "usable", "dsps"), 1.5, r"figures\.usable\.dsps: 1\.5 is greater"),
        (("figures", "dsp_packing", "8"), 2.5, r"figures\.dsp_packing\.8: 2\.5 is not of type 'integer'"),
        (("figures", "ffs"), 3, r"figures: Additional properties are not allowed \('ffs'"),
        (("alignment",), 0, r"alignment: 0 is less"),
    ],
)
def test_wrong_figures_are_named(tmp_path, path, value, message):
    data = json.loads(resources.files("mpq.cost_models").joinpath("zcu102.json").read_text("utf8"))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "mine.json").write_text(json.dumps(data), "utf8")
    with pytest.raises(FormatError, match=message):
        load_device(tmp_path / "mine.json")


def test_arrays_that_fuse_need_their_widths(tmp_path):
    data = json.loads(resources.files("mpq.cost_models").joinpath("bitfusion.json").read_text("utf8"))
    del data["figures"]["brick_bits"]
    (tmp_path / "mine.json").write_text(json.dumps(data), "utf8")
    with pytest.raises(FormatError, match=r"figures: 'brick_bits' is a required property"):
        load_device(tmp_path / "mine.json")


def test_latency_says_that_it_is_an_interval_and_that_weights_do_not_fit():
    def notes(width):
        net = nn.Sequential(nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False))
        space = make_space(trace_model(net, torch.zeros(1, width)), "W4A4,W8A8", device=find_device("pynq-z1"))
        return latency(space).notes

    assert "between two results" in notes(8)[1]
    assert not any("no pipeline fits" in note for note in notes(8))
    holds = 0.8 * 280 * 18 * 128 + 0.7 * 53200 * 8  # bytes of block RAM and of look-up tables
    width = math.ceil(math.sqrt(holds))  # two layers of half a byte for each weight
    assert not any("no pipeline fits" in note for note in notes(width - 1))
    assert (
        f"100% of what block RAM, UltraRAM and look-up tables of pynq-z1 can hold ({si(holds, 'B')})" in notes(width)[2]
    )
    assert "are 401% of what" in notes(2 * width)[2]  # 1,277 squared is a little more
