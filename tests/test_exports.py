import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llama import analysed, mixed, tiny_llama, tokens
from torch import nn

import mpq
from mpq.errors import FormatError, GraphError
from mpq.export import RUNTIMES

pytest.importorskip("transformers", reason="needs transformers")


def test_recipes_need_neither_torch_nor_the_tool(tmp_path):
    config = mixed(analysed(tiny_llama(), "W4:g32,W8:g32", "llama.cpp"), lambda n: "W8:g32" if "q_" in n else "W4:g32")
    bits = config.save(tmp_path / "bits.json")
    code = f"""
import sys
import mpq
config = mpq.load({str(bits)!r})
for name in ("compressed-tensors", "mlx", "gptqmodel", "autoround", "modelopt"):
    print(mpq.export(config, name, {str(tmp_path / "out")!r}).summary())
assert not {{"torch", "mlx", "gptqmodel", "auto_round", "modelopt", "compressed_tensors"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("14 exact of 14 layers, 2 left float") == 4
    assert "mlx: 14 approximated of 14 layers, 2 left float" in done.stdout


def test_unknown_options_are_named(tmp_path):
    config = mixed(analysed(tiny_llama(), "W4:g32", "torchao"), lambda _: "W4:g32")
    with pytest.raises(mpq.MpqError, match="exporter 'torchao' has no option 'colour'; it takes form"):
        mpq.export(config, "torchao", tmp_path / "x", colour="red")
    with pytest.raises(mpq.MpqError, match="exporter 'json' has no option 'colour'; it takes none"):
        mpq.export(config, "json", tmp_path / "x", colour="red")


def test_where_nothing_can_be_written(tmp_path):
    config = mixed(analysed(tiny_llama(), "W4:g32", "torchao"), lambda _: "W4:g32")
    with pytest.raises(mpq.MpqError, match=r"there is no folder .*absent to write x\.json into"):
        mpq.export(config, "json", tmp_path / "absent/x.json")
    with pytest.raises(mpq.MpqError, match=r"can't be written: .*[Dd]irectory"):
        mpq.export(config, "json", tmp_path)


def test_a_missing_tool_is_named_with_its_extra(tmp_path, monkeypatch):
    config = mixed(analysed(tiny_llama(), "W4:g32", "llama.cpp"), lambda _: "W4:g32")
    from mpq.export.openvino import compress

    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for name, extra in (("torchao", "export-torchao"), ("llama.cpp", "export-llama-cpp")):
        options = {} if name == "torchao" else {"architecture": "llama"}
        with pytest.raises(mpq.MpqError, match=rf"is not installed: pip install 'mpq\[{extra}\]'"):
            mpq.export(config, name, tmp_path / "x", **options)
    with pytest.raises(mpq.MpqError, match=r"is not installed: pip install 'mpq\[export-openvino\]'"):
        compress(None, mpq.export(config, "openvino", tmp_path / "plan.json"))


@pytest.mark.parametrize(
    ("name", "scheme", "extra"),
    [
        ("onnx-qdq", "W4:g32", "export-onnx"),
        ("onnx-matmulnbits", "W4:g32", "export-onnx"),
        ("aimet", "W4:g32", "export-aimet"),
        ("coreml", "W4:g32", "export-coreml"),
    ],
)
def test_a_missing_tool_that_needs_the_model_is_named_with_its_extra(tmp_path, monkeypatch, name, scheme, extra):
    model = tiny_llama()
    config = mixed(analysed(model, scheme, name), lambda _: scheme)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(mpq.MpqError, match=rf"is not installed: pip install 'mpq\[{extra}\]'"):
        mpq.export(config, name, tmp_path / "x.mlpackage", model, sample=tokens()[0])


def test_files_of_others_are_named(tmp_path):
    from mpq.export.hls4ml import update
    from mpq.export.modelopt import load_modelopt

    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "torn.json").write_text("{")
    for file in ("absent.json", "list.json", "torn.json"):
        for read in (load_modelopt, lambda path: update({}, path)):
            with pytest.raises(mpq.MpqError, match=rf"{file} .*; write it with mpq.export"):
                read(tmp_path / file)
    with pytest.raises(mpq.MpqError, match=r"other.json holds no types of mpq.export"):
        update({}, tmp_path / "other.json")


def test_layers_left_out_are_reported(tmp_path):
    config = mixed(analysed(tiny_llama(), "W4:g32", "gptqmodel"), lambda _: "W4:g32")
    found = mpq.export(config, "gptqmodel", tmp_path / "x.json")
    left = {n: why for n, (status, why) in found.layers.items() if status == "left float"}
    assert left == dict.fromkeys(["model.embed_tokens", "lm_head"], "skipped by the user")
    assert found.layers["model.layers.0.mlp.up_proj"] == ("exact", "W4:g32; codes and scales by GPTQModel")


def test_other_types_are_refused(tmp_path):
    config = mixed(analysed(tiny_llama(), "W4:g32", "gptqmodel"), lambda _: "W4:g32")
    with pytest.raises(mpq.MpqError, match=r"config must be a BitConfig, such as mpq\.load\(path\) gives, not str"):
        mpq.export("bits.json", "json", tmp_path / "x.json")
    with pytest.raises(mpq.MpqError, match="option 'fold' of exporter 'onnx-qdq' is true or false, not 'maybe'"):
        mpq.export(config, "onnx-qdq", tmp_path / "x.onnx", fold="maybe")


def test_runtimes_that_do_not_load_the_usual_schemes_have_their_own():
    model, data = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 64)), [torch.randn(4, 96)]
    options = {"estimator": "weight_sqnr", "progress": False}
    assert "W4:g32" in map(str, mpq.analyze(model, data, runtime="vllm", **options).space.schemes)
    usual = {str(s) for s in mpq.analyze(model, data, runtime="onnx-qdq", **options).space.schemes}
    assert usual <= {"W2A8", "W3A8", "W4A8", "W8A8"}
    with pytest.warns(UserWarning, match="does not quantize conv2d layers$"):
        mpq.analyze(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 64)),
            [torch.randn(2, 1, 6, 6)],
            runtime="vllm",
            **options,
        )


def test_pins_are_held_against_the_runtime():
    model, data = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 64)), [torch.randn(4, 96)]
    options = {"runtime": "vllm", "estimator": "weight_sqnr", "progress": False}
    with pytest.raises(FormatError, match=r"layer '0' is pinned to W4:g128, but .*divide the 96 input features"):
        mpq.analyze(model, data, "W4:g32,W8", pin={"0": "W4:g128"}, **options)
    pinned = mpq.analyze(model, data, "W4:g64", pin={"0": "W8"}, **options)  # without the pin it stays float
    assert {n: str(c.scheme) for n, c in pinned.allocate("size<=90%").items()} == {"0": "W8", "1": "W4:g64"}
    with pytest.warns(UserWarning, match=r"1 layers \(.*% of the parameters\) stay float, such as '0'"):
        config = mpq.analyze(model, data, "W4:g64", **options).allocate("size<=90%")
    assert "divide the 96 input features" in next(o.reason for o in config.outside if o.name == "0")


def test_runtimes_of_other_layers_are_named(example):
    with pytest.raises(GraphError, match=r"nothing is left to search, .* conv2d layers are quantized by .*onnx-qdq"):
        mpq.analyze(nn.Sequential(nn.Conv2d(1, 2, 3)), example[1][:1], runtime="gptqmodel", progress=False)


def test_default_schemes_of_runtimes_have_several_widths():
    for runtime in RUNTIMES.values():
        schemes = runtime.examples()
        assert len({s.weight.bits for s in schemes}) >= 2, runtime.name


def test_trouble_of_a_tool_is_not_blamed_on_the_path(tmp_path, monkeypatch):
    def lacking(config, path, model):
        raise FileNotFoundError(2, "No such file", "/elsewhere/tool.so")

    config = mixed(analysed(tiny_llama(), "W4:g32", "gptqmodel"), lambda _: "W4:g32")
    monkeypatch.setitem(mpq.export.EXPORTERS, "lacking", lacking)
    with pytest.raises(FileNotFoundError, match=r"elsewhere/tool\.so"):
        mpq.export(config, "lacking", tmp_path / "x")


def test_every_silent_trap_has_its_test():
    root = Path(__file__).parents[1]
    if not (root / "CONTRIBUTING.md").is_file():
        pytest.skip("needs the checkout, not only the wheel")
    table = (root / "CONTRIBUTING.md").read_text().partition("| trap | test |")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    tests = "".join(f.read_text() for f in (root / "tests").glob("test_export*.py"))
    assert len(rows) == 12
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row)
        assert names
        assert all(f"def {n}(" in tests for n in names), row
