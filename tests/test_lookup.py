import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.cost_models import importers
from mpq.cost_models.devices import find_device, load_device
from mpq.cost_models.latency import latency, layer_times
from mpq.cost_models.workload import make_workload
from mpq.errors import BudgetError, FormatError
from mpq.layers import LayerSpec
from mpq.quantizers import Scheme

REFERENCE = Path(os.environ.get("MPQ_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "reference"
W8A8, W4A8 = Scheme.parse("W8A8"), Scheme.parse("W4A8")


def conv(name, out, channels, side, kernel=3, calls=1):
    weight = (out, channels, kernel, kernel)
    size = out * channels * kernel * kernel
    macs = size * side * side * calls
    return LayerSpec(name, "conv2d", weight, weight, (channels, side, side), (out, side, side), macs, size, calls, 0, 0)


def row(layer, seconds, weight="int8", activation="int8", **more):
    shapes = {"weight_shape": layer.rows_shape, "input_shape": layer.input_shape, "output_shape": layer.output_shape}
    found = {"op": layer.op, **{k: list(v) for k, v in shapes.items()}}
    return {**found, "weight": weight, "activation": activation, "seconds": seconds, **more}


def device(tmp_path, rows, **options):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(importers.table_profile("mine", rows, "me", **options)))
    return load_device(path)


def test_times_are_those_of_the_table(tmp_path):
    a, twice = conv("a", 4, 3, 8), conv("b", 4, 4, 8, calls=2)
    rows = [
        row(a, 1e-3),
        row(a, 7e-4, "int4"),
        row(twice, 5e-4),
        {"layer": "b", "weight": "int4", "activation": "int8", "seconds": 3e-4},
    ]
    found = layer_times(make_workload([a, twice]), [W8A8, W4A8], device(tmp_path, rows))
    np.testing.assert_allclose(found.total, [[1e-3, 7e-4], [2 * 5e-4, 2 * 3e-4]])
    assert found.bound_by(0, 0) == "measured"


def test_what_is_not_in_the_table_is_an_error_that_names_it(tmp_path):
    known, unknown = conv("a", 4, 3, 8), conv("deep.b", 4, 4, 8)
    table = device(tmp_path, [row(known, 1e-3), row(known, 7e-4, "int4"), row(unknown, 1e-3)])
    with pytest.raises(BudgetError, match=r"'mine' has no time for deep.b \(W4A8\) at batch 1; measure them"):
        layer_times(make_workload([known, unknown]), [W8A8, W4A8], table)
    with pytest.raises(BudgetError, match=r"a \(W8A8\), deep.b \(W8A8\) at batch 4"):
        layer_times(make_workload([known, unknown], table.at(batch=4).setting), [W8A8], table.at(batch=4))
    assert not table.supports(Scheme.parse("W2A8"))


def test_the_nearest_shape_is_scaled_by_its_work(tmp_path):
    near, far, asked = conv("a", 16, 16, 8), conv("b", 16, 16, 64), conv("c", 16, 32, 8)
    table = device(tmp_path, [row(near, 1e-3), row(far, 9e-3)], interpolate=True)
    work = make_workload([near, asked])
    np.testing.assert_allclose(layer_times(work, [W8A8], table).total[:, 0], [1e-3, 2e-3])
    linear = LayerSpec("fc", "linear", (4, 4), (4, 4), (4,), (4,), 16, 16, 1, 0, 0)
    with pytest.raises(BudgetError, match="no time for fc"):  # another operator is not near
        layer_times(make_workload([linear]), [W8A8], table)


def test_a_network_gets_its_latency_from_a_table(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(48, 5)).eval()
    data = np.random.default_rng(0).standard_normal((4, 1, 6, 6), np.float32)
    rows = importers.from_bit_table(
        np.arange(8.0).reshape(2, 2, 2) + 1, ["0", "2"], weight_bits=(4, 8), activation_bits=(4, 8)
    )
    analysis = mpq.analyze(net, torch.from_numpy(data), "W4A8,W8A8", device=device(tmp_path, rows), progress=False)
    assert latency(analysis.space).cost.tolist() == [[2.0, 4.0], [6.0, 8.0]]


@pytest.mark.skipif(not REFERENCE.exists(), reason="no reference figures in ../shared")
def test_haq_s_table_is_read_whole(tmp_path):
    data = json.loads((REFERENCE / "haq_mobilenetv2_latency_lut.json").read_text("utf8"))
    names = [layer["name"] for layer in data["layers"]]
    cycles = np.array([layer["cycles"] for layer in data["layers"]])
    table = device(tmp_path, importers.from_bit_table(cycles, names, unit=1e-9))
    layers = [conv(name, 1, 1, 1) for name in names]
    schemes = [Scheme.parse(f"W{w}A{a}") for w in range(1, 9) for a in range(1, 9)]
    found = layer_times(make_workload(layers), schemes, table).total
    np.testing.assert_allclose(found, cycles.reshape(len(names), 64) * 1e-9)
    with pytest.raises(FormatError, match=r"shape \(53, 8, 8\), the layers and bits make \(52, 8, 8\)"):
        importers.from_bit_table(cycles, names[1:])


def test_rows_from_csv_and_json(tmp_path):
    layer = conv("a", 4, 3, 8)
    (tmp_path / "t.csv").write_text(
        "op,weight_shape,input_shape,output_shape,weight,activation,seconds,layer\n"
        "conv2d,4x3x3x3,3x8x8,4x8x8,int8,int8,0.001,\n"
        ",,,,int8,int8,0.002,b\n"
    )
    rows = importers.from_rows(tmp_path / "t.csv")
    assert rows == [row(layer, 1e-3), {"layer": "b", "weight": "int8", "activation": "int8", "seconds": 2e-3}]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    assert importers.from_rows(tmp_path / "t.json") == rows
    (tmp_path / "t.csv").write_text("layer,weight,activation,seconds\na,int8,int8,fast\n")
    with pytest.raises(FormatError, match="no table of times: could not convert"):
        importers.from_rows(tmp_path / "t.csv")


def test_trtexec_names_are_matched_to_layers(tmp_path):
    names = "layer1.0.conv1", "fc"
    layers = [conv(n, 4, 4, 4) for n in names]
    profile = [
        {"count": 100},
        {
            "name": "Reformatting CopyNode for Input Tensor 0 to /conv1/Conv",
            "timeMs": 10,
            "averageMs": 0.1,
            "percentage": 1,
        },
        {
            "name": "/layer1/layer1.0/conv1/Conv + /layer1/layer1.0/relu/Relu",
            "timeMs": 30,
            "averageMs": 0.3,
            "percentage": 1,
        },
        {"name": "/fc/Gemm", "timeMs": 60, "averageMs": 0.6, "medianMs": 0.6, "percentage": 1},
    ]
    (tmp_path / "p.json").write_text(json.dumps(profile))
    with pytest.warns(UserWarning, match=r"10.0% of the time is in no layer and left out: Reformatting"):
        rows = importers.from_trtexec(tmp_path / "p.json", layers, "int8", "int8", batch=8)
    assert [(r["layer"], r["batch"]) for r in rows] == [(n, 8) for n in names]
    np.testing.assert_allclose([r["seconds"] for r in rows], [3e-4, 6e-4])
    with (
        pytest.raises(FormatError, match="no name in the profile"),
        pytest.warns(UserWarning, match="100.0% of the time"),
    ):
        importers.from_trtexec(tmp_path / "p.json", [conv("other", 4, 4, 4)], "int8", "int8")
    (tmp_path / "p.json").write_text("[3]")
    with pytest.raises(FormatError, match="not written by trtexec"):
        importers.from_trtexec(tmp_path / "p.json", layers, "int8", "int8")


def test_qnn_cycles_become_seconds(tmp_path):
    (tmp_path / "p.txt").write_text(
        "    QNN accelerator (execute) time : 2000 us\n"
        "    Accelerator (execute) time (cycles) : 1000000 cycles\n"
        "    layers_0_q_proj_fc:OpId_27 (cycles) : 300000 cycles\n"
        "    layers_0_q_proj_fc_post_reshape:OpId_29 (cycles) : 100000 cycles\n"
        "    layers_0_q:OpId_30 (cycles) : 5000 cycles\n"
        "    softmax:OpId_31 (cycles) : 95000 cycles\n"
    )
    layers = [conv("layers.0.q_proj", 4, 4, 4), conv("layers.0.q", 4, 4, 4)]
    with pytest.warns(UserWarning, match=r"19.0% of the time is in no layer and left out: softmax"):
        rows = importers.from_qnn(tmp_path / "p.txt", layers, "int4", "int8")
    assert {r["layer"]: r["seconds"] for r in rows} == pytest.approx({"layers.0.q_proj": 8e-4, "layers.0.q": 1e-5})
    (tmp_path / "p.txt").write_text("nothing")
    with pytest.raises(FormatError, match="profile with --profiling_level detailed"):
        importers.from_qnn(tmp_path / "p.txt", layers, "int4", "int8")


def test_the_best_kernel_of_a_tvm_log(tmp_path):
    tensors = [["TENSOR", [1, 3, 224, 224], "float32"], ["TENSOR", [64, 3, 7, 7], "float32"]]
    task = ["llvm", "conv2d_NCHWc.x86", [*tensors, [2, 2], [3, 3, 3, 3], [1, 1], "NCHW", "NCHW", "float32"], {}]
    depthwise = [
        ["TENSOR", [1, 8, 6, 6], "int8"],
        ["TENSOR", [8, 1, 3, 3], "int8"],
        [1, 1],
        [1, 1],
        [1, 1],
        "NCHW",
        "int32",
    ]
    records = [
        {"input": task, "config": {}, "result": [[4e-3], 0, 0.5, 1.0], "version": 0.2},
        {"input": task, "config": {}, "result": [[2e-3, 4e-3], 0, 0.5, 1.0], "version": 0.2},
        {"input": task, "config": {}, "result": [[1e-9], 4, 0.5, 1.0], "version": 0.2},
        {"input": ["cuda", "depthwise_conv2d_nchw.cuda", depthwise, {}], "result": [[1e-4], 0, 0.5, 1.0]},
        {
            "input": ["cuda", "conv2d_HWNCnc_tensorcore.cuda", [*tensors, [1, 1], "HWNC"], {}],
            "result": [[1e-4], 0, 0.5, 1.0],
        },
        {
            "input": ["cuda", "dense_int8.cuda", [["TENSOR", [8, 512], "int8"], ["TENSOR", [1000, 512], "int8"]], {}],
            "result": [[4e-6], 0, 1, 1],
        },
    ]
    (tmp_path / "log").write_text("\n".join(map(json.dumps, records)))
    with pytest.warns(UserWarning, match="left out, no layers in NCHW: conv2d_HWNCnc_tensorcore.cuda"):
        stem, small, dense = importers.from_tvm(tmp_path / "log")
    assert (stem["output_shape"], stem["weight"], stem["seconds"]) == ([64, 112, 112], "fp32", pytest.approx(3e-3))
    assert (small["op"], small["output_shape"], small["activation"]) == ("conv2d", [8, 6, 6], "int8")
    assert (dense["op"], dense["input_shape"], dense["output_shape"], dense["batch"]) == ("linear", [512], [1000], 8)
    table = device(tmp_path, [stem, small])
    layer = LayerSpec(
        "conv1", "conv2d", (64, 3, 7, 7), (64, 3, 7, 7), (3, 224, 224), (64, 112, 112), 118013952, 9408, 1, 0, 0
    )
    assert layer_times(make_workload([layer]), [Scheme.parse("W32A32")], table).total == pytest.approx(3e-3)
    assert layer_times(make_workload([layer]), [Scheme.parse("W32")], table).total == pytest.approx(3e-3)


@pytest.mark.parametrize("line", ['{"input": ', '{"input": ["cuda", "dense"]}', '{"input": [1], "result": [[1], 0]}'])
def test_a_bad_line_of_a_tvm_log_is_named(tmp_path, line):
    (tmp_path / "log").write_text("some text\n" + line)
    with pytest.raises(FormatError, match="log, line 2: no record of AutoTVM"):
        importers.from_tvm(tmp_path / "log")


@pytest.mark.parametrize("setting", [{"phase": "decode"}, {"tokens": 7}])
def test_a_table_knows_no_other_number_of_tokens(tmp_path, setting):
    layer = conv("a", 4, 4, 8)
    table = device(tmp_path, [row(layer, 1e-3)]).at(**setting)
    with pytest.raises(BudgetError, match="none for decoding or other numbers of tokens"):
        layer_times(make_workload([layer], table.setting), [W8A8], table)


def test_a_path_takes_settings(tmp_path):
    device(tmp_path, [row(conv("a", 4, 4, 8), 1e-3)])
    assert find_device(f"{tmp_path}/table.json:batch=8").setting.batch == 8
    with pytest.raises(FormatError, match="'fast' is no setting"):
        find_device(f"{tmp_path}/table.json:fast")


def test_a_table_without_times_is_no_profile(tmp_path):
    with pytest.raises(FormatError, match=r"figures.rows"):
        device(tmp_path, [])
    with pytest.raises(FormatError, match=r"figures.rows.0"):
        device(tmp_path, [{"weight": "int8", "activation": "int8", "seconds": 1.0}])
    assert find_device("x86_vnni").kind == "cpu"
