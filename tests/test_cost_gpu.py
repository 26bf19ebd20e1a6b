"""The GPU cost model against a slow twin, hand-worked kernels, published figures, and its own rules."""

import itertools
import json
import math
import time
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
from cost_layers import graph, linear
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.cost_models import all_devices, find_device
from mpq.cost_models.devices import load_device
from mpq.cost_models.gpu import find_arithmetic, format_bits, layer_times
from mpq.cost_models.latency import latency
from mpq.cost_models.workload import make_workload
from mpq.errors import BudgetError, FormatError
from mpq.layers import LayerSpec
from mpq.quantizers import Scheme
from mpq.space import make_space

GPUS = [name for name, device in all_devices().items() if device.kind == "gpu"]
SCHEMES = [Scheme.parse(s) for s in ("W4A4", "W8A8", "W4A8", "W4:g32A16", "W8A16", "W16A16", "W32")]


def convolution(inputs, outputs, size, hw, groups=1, stride=1):
    shape = (outputs, inputs // groups, size, size)
    out = hw // stride
    parameters = math.prod(shape)
    ends = (inputs, hw, hw), (outputs, out, out)
    return LayerSpec("conv", "conv2d", shape, shape, *ends, parameters * out * out, parameters, 1, 0, 0)


def embedding(rows, width, tokens):
    shape = (rows, width)
    return LayerSpec("emb", "embedding", shape, shape, (tokens,), (tokens, width), 0, rows * width, 1, 0, None)


LAYERS = [
    linear(4096, 11008, 7),
    linear(64, 10),
    convolution(64, 128, 3, 28, stride=2),
    convolution(96, 96, 3, 14, groups=96),
    convolution(64, 64, 3, 14, groups=4),
    convolution(64, 256, 1, 56, stride=2),
    embedding(50000, 512, 9),
]


def seconds(layer, scheme, device):
    schemes = [Scheme.parse(scheme) if isinstance(scheme, str) else scheme]
    return layer_times(make_workload([layer], device.setting), schemes, device).total[0, 0]


def twin(layer, scheme, device):
    """The model, one layer and one tile at a time."""
    f, batch = device.figures, device.setting.batch
    kernel = device.kernel(scheme)
    weight, activation = kernel.runs_as or (kernel.weight, kernel.activation)
    peak = next(k.peak for k in device.kernels if (k.weight, k.activation) == (weight, activation))
    rate, step = peak * f["efficiency"][weight], 8 * f["step_bytes"] // format_bits(weight)
    kept_floats = 32 if scheme.weight.name == "fp32" else 16
    bits = kept_floats if scheme.activation is None else scheme.activation.bits
    integer = weight.startswith("int")
    stored = scheme.weight.storage_bits(layer.rows_shape) / 8
    results = math.prod(layer.output_shape) * batch
    cache, main = device.memory
    if layer.op == "embedding":
        ids = math.prod(layer.input_shape) * batch
        read = stored * min(1, ids / layer.rows_shape[0])
        moved, kept = [read, 8 * ids, 2 * results], cache.size_bytes / 2
        far = (read + sum(max(x - kept, 0) for x in moved[1:])) / (main.bandwidth * f["memory_efficiency"])
        return f["launch"] + max(far, sum(moved) / cache.bandwidth)
    groups = layer.input_shape[0] // layer.rows_shape[1] if layer.op == "conv2d" else 1
    rows = layer.macs // layer.parameters * batch
    columns, depth = layer.rows_shape[0] // groups, math.prod(layer.rows_shape[1:])
    inputs = min(math.prod(layer.input_shape) * batch, rows * depth * groups) * bits / 8
    outputs = results * (f["output_bits"] if integer else max(bits, 16)) / 8
    kept = cache.size_bytes / 2
    far = (stored + max(inputs - kept, 0) + max(outputs - kept, 0)) / (main.bandwidth * f["memory_efficiency"])
    scaled = results / f["requantize"] if integer else 0
    found = []

    def add(compute, widened, moved):
        widening = widened / kernel.widen if kernel.widen else 0
        traffic = max(moved / cache.bandwidth, far)
        p = f["overlap"]
        found.append([((compute + w + widening) ** p + traffic**p) ** (1 / p) for w in (0, scaled)])

    if groups > 1:
        add(rows * columns * depth * groups / f["vector"], layer.parameters, inputs + stored + outputs)
    for (tall, wide), split in itertools.product(f["tiles"], f["splits"]):
        down, across = math.ceil(rows / tall), math.ceil(columns / wide)
        waves = math.ceil(down * across * groups * split / f["processors"])
        padded = math.ceil(depth / split / step) * step
        compute = waves * tall * wide * padded / (rate / f["processors"]) + f["chain"] * depth / split
        partial = 8 * split * results if split > 1 else 0
        add(compute, layer.parameters * down, inputs * across + stored * down + outputs + partial)
    return f["launch"] + min(found)[1]


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("batch", [1, 48])
def test_agrees_with_the_slow_twin(name, batch):
    device = find_device(name).at(batch=batch)
    schemes = [s for s in SCHEMES if device.supports(s)]
    times = layer_times(make_workload(LAYERS, device.setting), schemes, device)
    expected = [[twin(layer, scheme, device) for scheme in schemes] for layer in LAYERS]
    np.testing.assert_allclose(times.total, expected, rtol=1e-12)


def bare(**changes):
    """Three processors, one tile, a roofline, memory without end: what is left is arithmetic."""
    device = find_device("t4")
    figures = {
        "processors": 3,
        "tiles": [[128, 64]],
        "splits": [1],
        "step_bytes": 16,
        "efficiency": {"int8": 0.5, "int4": 0.5},
        "memory_efficiency": 1.0,
        "overlap": 2,
        "chain": 0.0,
        "launch": 0.0,
        "requantize": math.inf,
        "vector": 1e9,
        "output_bits": 32,
    }
    memory = tuple(replace(m, bandwidth=1e30) for m in device.memory)
    return replace(device, figures=figures | changes, memory=memory)


def test_tiles_and_waves_by_hand():
    device = bare()
    tile = 128 * 64 * 48 / (0.5 * 65e12 / 3)  # of a depth of 33 to 48: three instructions of 16 products
    for rows, columns, waves in ((128, 64, 1), (1, 1, 1), (129, 64, 1), (384, 64, 1), (385, 64, 2), (384, 65, 2)):
        assert seconds(linear(40, columns, rows), "W8A8", device) == pytest.approx(waves * tile, rel=1e-9)
    assert seconds(linear(48, 64, 1), "W8A8", device) == pytest.approx(tile, rel=1e-9)
    assert seconds(linear(49, 64, 1), "W8A8", device) == pytest.approx(tile * 64 / 48, rel=1e-9)
    # int4: twice the rate, but 40 products fill two instructions of 32
    assert seconds(linear(40, 64, 1), "W4A4", device) == pytest.approx(tile * 64 / 48 / 2, rel=1e-9)
    # a chain of sums that split depth shortens
    chained = bare(chain=1e-6, splits=[1, 4])
    expected = 128 * 64 * 16 / (0.5 * 65e12 / 3) * 2 + 1e-6 * 40 / 4  # 4 blocks: two waves of one instruction each
    assert seconds(linear(40, 64, 1), "W8A8", chained) == pytest.approx(expected, rel=1e-9)


def test_launch_requantization_and_the_two_memories_by_hand():
    layer, fast = linear(1000, 500, 8), find_device("t4")
    memory = (replace(fast.memory[0], size_bytes=2e4, bandwidth=2e9), replace(fast.memory[1], bandwidth=1e9))
    device = replace(bare(launch=1e-6), memory=memory)
    stored = (8 * 500_000 + 500 * 32) / 8
    # 8,000 bytes of inputs stay in half of the cache, 6,000 of 16,000 bytes of outputs do not
    far = (stored + (16_000 - 10_000)) / 1e9
    near = (8_000 * 8 + stored + 16_000) / 2e9  # 8 columns of tiles read the inputs
    compute = math.ceil(8 / 3) * 128 * 64 * 1008 * 3 / (0.5 * 65e12)
    expected = 1e-6 + math.hypot(compute, max(far, near))
    assert seconds(layer, "W8A8", device) == pytest.approx(expected, rel=1e-12)
    slow = replace(device, figures=device.figures | {"requantize": 4e6})
    assert seconds(layer, "W8A8", slow) == pytest.approx(1e-6 + math.hypot(compute + 1e-3, max(far, near)), rel=1e-12)


def test_weight_only_kernels_gain_bandwidth_and_nothing_else():
    """As Marlin: close to the bytes saved with few rows, even with many, where widening shows."""
    layer = linear(4096, 22016)
    for name in ("a100", "h100", "l4", "rtx4090"):
        device = find_device(name)
        few, many = device.at(tokens=1), device.at(tokens=8192)
        assert 2.5 < seconds(layer, "W16A16", few) / seconds(layer, "W4:g128A16", few) < 3.9
        assert 1.6 < seconds(layer, "W16A16", few) / seconds(layer, "W8A16", few) < 2
        assert 0.8 < seconds(layer, "W16A16", many) / seconds(layer, "W4:g128A16", many) < 1.06
        # W4A8 as QServe: bytes of int4, rate of int8
        assert seconds(layer, "W4A8", few) < seconds(layer, "W8A8", few)
        assert seconds(layer, "W16A16", many) > 1.5 * seconds(layer, "W4A8", many)
        ratio = seconds(layer, "W8A8", many) / seconds(layer, "W4A8", many)
        assert 0.85 < ratio < 1.05
        times = layer_times(make_workload([layer], many.setting), [Scheme.parse("W4:g128A16")], many)
        assert times.widening[0, 0] > 0


def test_kernels_that_a_device_lacks_are_absent():
    assert not find_device("h100").supports(Scheme.parse("W4A4"))
    assert not find_device("t4").supports(Scheme.parse("W4A8"))
    assert not find_device("t4").supports(Scheme.parse("W4"))
    assert find_device("a100").supports(Scheme.parse("W4"))  # activations as the device keeps floats: fp16
    with pytest.raises(BudgetError, match="W4A8 has no kernel on t4; it runs int4 x int4"):
        seconds(LAYERS[0], "W4A8", find_device("t4"))


def test_a_kernel_without_figures_is_an_error():
    device = find_device("a100")
    kernels = tuple(replace(k, peak=None) if k.weight == k.activation == "fp16" else k for k in device.kernels)
    with pytest.raises(BudgetError, match="'a100' has no peak for fp16 x fp16, which runs int4 x fp16"):
        seconds(LAYERS[0], "W4A16", replace(device, kernels=kernels))
    figures = dict(device.figures) | {"efficiency": {"fp16": 0.5}}
    with pytest.raises(BudgetError, match="no efficiency for int8 x int8"):
        find_arithmetic(device.kernel(Scheme.parse("W8A8")), replace(device, figures=figures))


def test_depthwise_convolutions_gain_no_arithmetic():
    device = find_device("a100:batch=64")
    times = layer_times(make_workload([convolution(960, 960, 5, 28, groups=960)], device.setting), SCHEMES[:2], device)
    assert times.compute[0, 0] == times.compute[0, 1]
    assert times.memory[0, 0] < times.memory[0, 1]


def test_embeddings_read_rows_and_multiply_nothing():
    device = find_device("a100")
    times = layer_times(make_workload([embedding(10**6, 512, 4)], device.setting), SCHEMES[3:4], device)
    assert times.compute[0, 0] == times.widening[0, 0] == 0
    whole = layer_times(make_workload([embedding(10**6, 512, 10**6)], device.setting), SCHEMES[3:4], device)
    assert times.memory[0, 0] < 1e-4 * whole.memory[0, 0]


def test_decoding_runs_one_token():
    layer = linear(4096, 4096, 128)
    device = find_device("a100")
    assert seconds(layer, "W8A8", device.at(phase="decode")) == seconds(layer, "W8A8", device.at(tokens=1))
    assert seconds(layer, "W8A8", device.at(phase="decode")) < seconds(layer, "W8A8", device)


shapes = st.builds(
    lambda kind, a, b, rows: linear(a, b, rows) if kind else convolution(a, b, 3, min(rows, 56)),
    st.booleans(),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(1, 300),
)


@settings(max_examples=25, deadline=None)
@given(shapes, st.sampled_from(GPUS), st.integers(1, 300), st.integers(1, 300), st.floats(0.1, 10))
def test_monotone_in_batch_bandwidth_and_bits(layer, name, batch, more, factor):
    """Documented exceptions in bits: widened weights, and depths that do not fill an int8 instruction once split."""
    device = find_device(name).at(batch=batch)
    schemes = [s for s in (*SCHEMES[:2], SCHEMES[3]) if device.supports(s)]
    now = layer_times(make_workload([layer], device.setting), schemes, device).total
    larger = device.at(batch=batch + more)
    assert (layer_times(make_workload([layer], larger.setting), schemes, larger).total >= now * (1 - 1e-12)).all()
    for level in (0, 1):
        memory = list(device.memory)
        memory[level] = replace(memory[level], bandwidth=memory[level].bandwidth * (1 + factor))
        faster = replace(device, memory=tuple(memory))
        assert (layer_times(make_workload([layer], faster.setting), schemes, faster).total <= now * (1 + 1e-12)).all()
    filled = math.prod(layer.rows_shape[1:]) > max(device.figures["splits"]) * device.figures["step_bytes"]
    if filled and device.supports(SCHEMES[0]):
        assert now[0, 0] <= now[0, 1] * (1 + 1e-12)


def test_ten_thousand_layers_by_twenty_schemes_in_a_second():
    rng = np.random.default_rng(0)
    layers = [linear(*map(int, rng.integers(1, 4096, 3))) for _ in range(10_000)]
    names = ["W4A4", "W8A8", "W4A8", "W16A16", "W32"]
    names += [f"W{b}{g}A16" for b in (4, 8) for g in ("", ":tensor", ":g32", ":g64", ":g128", ":asym", ":g64:asym")]
    schemes = [Scheme.parse(s) for s in [*names, "W8:tensorA8"]]
    assert len(schemes) == 20
    device = find_device("a100")
    work = make_workload(layers, device.setting)
    elapsed = []
    for _ in range(3):
        started = time.process_time()
        assert layer_times(work, schemes, device).total.shape == (10_000, 20)
        elapsed.append(time.process_time() - started)
    assert min(elapsed) < 1


def test_every_figure_has_a_source():
    for name in GPUS:
        device = find_device(name)
        named = {key.split(".")[0] for key in device.sources}
        assert set(device.figures) | {"kernels", "peak", "memory"} <= named
        if any(k.widen for k in device.kernels):
            assert "widen" in named
        for key in (k for k in device.sources if k.startswith("efficiency.")):
            assert key.split(".")[1] in device.figures["efficiency"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["figures"].pop("launch"), "figures: 'launch' is a required property"),
        (lambda d: d["figures"].update(lanuch=1), r"figures: Additional properties are not allowed \('lanuch'"),
        (lambda d: d["figures"]["efficiency"].update(int8=1.5), "figures.efficiency.int8: 1.5 is greater than"),
        (lambda d: d["figures"].update(tiles=[[64]]), r"figures.tiles.0: \[64\] is too short"),
        (lambda d: d.pop("memory"), "'memory' is a required property"),
    ],
)
def test_errors_of_profiles_name_the_field(tmp_path, change, message):
    data = json.loads(resources.files("mpq.cost_models").joinpath("a100.json").read_text("utf8"))
    change(data)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data))
    with pytest.raises(FormatError, match=message):
        load_device(path)


def test_the_t4_is_what_its_tuning_logs_say(load_benchmark):
    """The shipped figures are the fit's: no step of one of them by 3 % has a lower error."""
    fit = load_benchmark("fit_gpu", reference=True)
    logs = fit.read_logs()
    assert len(logs.seconds) == 74
    device = fit.without_requantization(find_device("t4:batch=8"))
    figures = device.figures
    values = {k: figures["efficiency"][k] for k in ("int4", "int8")}
    values |= {k: figures[k] for k in ("memory_efficiency", "chain", "launch")} | {"l2": device.memory[0].bandwidth}
    shipped = fit.error(logs, device)
    assert shipped < 0.095
    for name, factor in itertools.product(values, (0.97, 1.03)):
        assert fit.error(logs, fit.with_figures(device, values | {name: values[name] * factor})) > shipped - 1e-4
    assert all(0.02 < values[k] < 0.13 for k in ("int4", "int8"))


def test_published_figures_of_hawq(load_benchmark):
    """Sizes, BitOps and T4 latencies that nothing was fitted on."""
    module = load_benchmark("fidelity_gpu", reference=True)
    rows = module.table_columns() + module.t4_latencies()
    assert len(rows) == 16
    assert [r.name for r in rows if not r.met] == []


def test_a_space_on_a_gpu_has_latencies():
    """Through the search space: the groups' layers add up."""
    layers = tuple(replace(linear(64, 64, 4, f"l{i}"), storage=i, source=i // 2) for i in range(4))
    device = find_device("a100:batch=2")
    cost = latency(make_space(graph(*layers), "W4A16,W8A8,W16A16", device=device))
    assert cost.cost.shape == (2, 3)  # readers of one tensor share a scheme
    np.testing.assert_allclose(cost.cost[0, 2], 2 * seconds(layers[0], "W16A16", device))  # nothing to convert
