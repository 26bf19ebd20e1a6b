"""Devices by name or file, with their settings."""

import json
from importlib import resources

import pytest

from mpq.cost_models import find_device
from mpq.errors import FormatError


def test_device_settings_are_read_from_its_name():
    setting = find_device("a100:decode:batch=8:context=2048").setting
    assert (setting.phase, setting.batch, setting.context) == ("decode", 8, 2048)
    for wrong in ("a100:batch=0", "a100:fast", "a100:batch=x"):
        with pytest.raises(FormatError, match="no setting"):
            find_device(wrong)


@pytest.mark.parametrize("wrong", [{"batch": -3}, {"phase": "decoding"}, {"tokens": 0}, {"context": -1}])
def test_settings_are_checked(wrong):
    with pytest.raises(FormatError, match=f"{next(iter(wrong))}.* of a device's setting"):
        find_device("t4").at(**wrong)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("zcu104", lambda d: d.pop("memory"), "'memory' is a required property"),
        ("zcu104", lambda d: d["memory"].clear(), "memory: .* should be non-empty"),
        ("zcu104", lambda d: d["figures"]["dsp_packing"].update({"8": 0}), "dsp_packing.8: 0 is less than the minimum"),
        ("t4", lambda d: d["memory"].pop(), "memory: .* is too short"),
        ("x86_vnni", lambda d: d["memory"].reverse(), "memory: dram is no smaller than l3; list the innermost first"),
        ("x86_vnni", lambda d: d["kernels"][0].update(weight="itn8"), "kernels.0.weight: 'itn8' does not match"),
        ("x86_vnni", lambda d: d["kernels"][2].update(runs_as=["int8", "int99"]), "kernels.2.runs_as.1: 'int99'"),
    ],
)
def test_profiles_that_no_model_could_read_are_refused(tmp_path, name, change, message):
    data = json.loads(resources.files("mpq.cost_models").joinpath(f"{name}.json").read_text("utf8"))
    change(data)
    (tmp_path / "mine.json").write_text(json.dumps(data))
    with pytest.raises(FormatError, match=message):
        find_device(f"{tmp_path}/mine.json")


def test_profiles_with_nan_are_no_json(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"schema": "mpq/device-1", "name": "mine", "kernels": NaN}')
    with pytest.raises(FormatError, match="NaN is no number"):
        find_device(str(path))


@pytest.mark.parametrize("device", ["t4:batch=2:batch=3", "t4:decode:prefill", "t4:batch=٣", 7, None])
def test_devices_that_are_none(device):
    with pytest.raises(FormatError):
        find_device(device)


def test_names_of_devices_are_found_whatever_their_case():
    with pytest.raises(FormatError, match="did you mean 'a100'"):
        find_device("A100")
