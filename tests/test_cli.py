import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import mpq
from mpq.cli import app, main

runner = CliRunner()


@pytest.fixture(scope="module")
def saved(analysis, tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    return [analysis.allocate(f"avg_bits<={bits}").save(folder / f"{bits}.json") for bits in (3, 4)]


def run(monkeypatch, capsys, *args):
    """Exit code, standard output and standard error of the real entry point."""
    monkeypatch.setattr("sys.argv", ["mpq", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        main()
    captured = capsys.readouterr()
    return caught.value.code or 0, captured.out, captured.err


def test_help_names_every_command():
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("demo", "allocate", "show", "report", "compare", "devices"):
        assert command in result.output
        assert runner.invoke(app, [command, "--help"]).exit_code == 0


def test_version():
    assert runner.invoke(app, ["--version"]).output.strip() == mpq.__version__


def test_show(saved):
    result = runner.invoke(app, ["show", str(saved[1])])
    assert result.exit_code == 0
    assert "layer3.2.conv2" in result.output
    assert "interaction: optimal for avg_bits<=4" in result.output


def test_report(saved, tmp_path):
    result = runner.invoke(app, ["report", str(saved[1]), "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 0
    assert "layer3.2.conv2" in (tmp_path / "page.html").read_text().replace("<wbr>", "")


def test_export_takes_the_exporters_options(saved, tmp_path, monkeypatch, capsys):
    to = "export", saved[1], "--to", "compressed-tensors", "--out", tmp_path / "out"
    code, _, told = run(monkeypatch, capsys, *to, "--option", "speed=9")
    assert code == 2
    assert "exporter 'compressed-tensors' has no option 'speed'; it takes" in " ".join(told.split())
    code, _, told = run(monkeypatch, capsys, *to, "--option", "speed")
    assert code == 2
    assert "--option takes name=value, such as fold=false, not 'speed'" in " ".join(told.split())


def test_trouble_with_files_is_one_line(saved, tmp_path, monkeypatch, capsys):
    code, _, told = run(monkeypatch, capsys, "report", saved[1], "--out", tmp_path)
    assert code == 2
    assert "error: " in told
    assert "Traceback" not in told
    (tmp_path / "deep.json").write_text("[" * 200_000)
    code, _, told = run(monkeypatch, capsys, "compare", saved[1], tmp_path / "deep.json", "--exit-code")
    assert code == 2
    assert "deep.json is not JSON" in " ".join(told.split())


def test_compare(saved):
    same = runner.invoke(app, ["compare", str(saved[0]), str(saved[0]), "--exit-code"])
    assert same.exit_code == 0
    assert "0 of 22 layers differ" in same.output
    different = runner.invoke(app, ["compare", *map(str, saved), "--exit-code"])
    assert different.exit_code == 1
    assert "avg_bits" in different.output
    assert runner.invoke(app, ["compare", *map(str, saved)]).exit_code == 0


def test_compare_says_that_models_differ(saved, tmp_path):
    other = mpq.allocate(nn.Sequential(nn.Linear(4, 3)), torch.randn(4, 4), "avg_bits<=4", "W4", progress=False)
    other.save(tmp_path / "other.json")
    output = runner.invoke(app, ["compare", str(saved[0]), str(tmp_path / "other.json")]).output
    assert "23 of 23 layers differ" in output
    assert "no layer in common" in output


def test_devices():
    result = runner.invoke(app, ["devices"])
    assert result.exit_code == 0
    assert "generic" in result.output
    assert "t4" in result.output


def test_devices_explains_one():
    result = runner.invoke(app, ["devices", "t4"])
    assert result.exit_code == 0
    assert "int4" in result.output
    assert "whitepaper" in result.output
    assert runner.invoke(app, ["devices", "t5"]).exit_code != 0


def test_allocate_writes_bits_and_report(tmp_path):
    out, report = tmp_path / "bits.json", tmp_path / "report.html"
    result = runner.invoke(
        app,
        [
            "allocate",
            "mpq.bundled:resnet20",
            "--calib",
            "mpq.bundled:calibration",
            "--budget",
            "avg_bits<=4",
            "--schemes",
            "W2A8,W4A8,W8A8",
            "--pin",
            "fc=W8A8",
            "--max-samples",
            "64",
            "--out",
            str(out),
            "--report",
            str(report),
        ],
    )
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert data["layers"]["fc"]["scheme"] == "W8A8"
    assert data["metrics"]["avg_bits"]["value"] <= 4
    assert 'id="heat"' in report.read_text()  # it has the analysis


def test_allocate_from_files(tmp_path):
    import numpy as np

    (tmp_path / "net.py").write_text(
        "import torch\ndef make():\n    torch.manual_seed(0)\n    return torch.nn.Sequential(torch.nn.Linear(4, 3))\n"
    )
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(70, 4)).astype("float32"))
    result = runner.invoke(
        app,
        [
            "allocate",
            f"{tmp_path}/net.py:make",
            "--calib",
            f"{tmp_path}/data.npz",
            "--budget",
            "avg_bits<=4",
            *("--weight-range", "mse:20", "--activation-range", "loss:3", "--store", str(tmp_path / "store")),
            "--out",
            str(tmp_path / "bits.json"),
        ],
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "bits.json").read_text())["provenance"]
    assert [found[k] for k in ("samples", "weight_range", "activation_range")] == [70, "mse:20", "loss:3"]
    assert list((tmp_path / "store").rglob("*.safetensors"))


EXAMPLE = ["allocate", "mpq.bundled:resnet20", "--calib", "mpq.bundled:calibration", "--budget"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["show", "absent.json"], 2, "error: absent.json can't be read"),
        (["allocate", "nope:x", "--calib", "nope:y", "--budget", "size<=25%"], 2, "can't import 'nope'"),
        (["allocate", "torch", "--calib", "x:y", "--budget", "size<=25%"], 2, "names no object"),
        (["allocate", "json:dumps.x", "--calib", "x:y", "--budget", "size<=25%"], 2, "json has no 'dumps.x'"),
        (
            ["allocate", "mpq.bundled:calibration", "--calib", "x:y", "--budget", "size<=25%"],
            2,
            "is a list, not a torch",
        ),
        ([*EXAMPLE, "size=25"], 2, "is not a budget"),
        ([*EXAMPLE, "size<=1%", "--max-samples", "64"], 3, "Smallest reachable: size 77.25 kB"),
        ([*EXAMPLE, "size<=25%", "--pin", "fc"], 2, "--pin takes layer=scheme"),
        ([*EXAMPLE, "size<=25%", "--calib", "absent.npz"], 2, "can't be read as an npz"),
        ([*EXAMPLE, "size<=25%", "--out", "no/where/bits.json"], 2, "there is no folder"),
        ([*EXAMPLE, "size<=25%", "--out", "."], 2, ". can't be written: it is a folder"),
        (["show", "."], 2, "error: . can't be read"),
        (["report", "absent.json"], 2, "error: absent.json can't be read"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_exit_codes_and_one_line_errors(monkeypatch, capsys, args, code, message):
    got, _, err = run(monkeypatch, capsys, *args)
    assert got == code
    assert message in err
    assert "Traceback" not in err
