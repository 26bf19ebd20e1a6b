import json
from dataclasses import replace
from importlib import resources

import jsonschema
import pytest

import mpq
from mpq.config import BitConfig, Measured
from mpq.errors import ConfigError


@pytest.fixture(scope="module")
def cfg(analysis):
    return analysis.allocate("avg_bits<=4").with_measured(Measured(10, 0.9, 0.3, 0.01, 0.95))


def test_round_trip_is_exact(cfg, tmp_path):
    path = cfg.save(tmp_path / "bits.json")
    again = mpq.load(path)
    assert again == cfg
    assert again.to_json() == path.read_text()
    assert again["fc"].activation_range == cfg["fc"].activation_range


@pytest.mark.parametrize(
    ("weights", "activations"),
    [("absmean", "loss"), ("absmedian", "loss:20"), ("pnorm:1e1", "percentile:99.9"), ("mse:40", "kl")],
)
def test_configs_with_any_range_rule_load(cfg, tmp_path, weights, activations):
    rules = {"weight_range": weights, "activation_range": activations}
    again = mpq.load(replace(cfg, provenance={**cfg.provenance, **rules}).save(tmp_path / "bits.json"))
    assert rules.items() <= again.provenance.items()


def test_findings_of_the_sanity_gate_are_shown_in_one_line(cfg, tmp_path):
    def found(*names, kind="not_monotone", action="kept as measured"):
        return [{"group": n, "kind": kind, "message": "", "action": action} for n in names]

    sound = replace(cfg, provenance={**cfg.provenance, "findings": []})
    assert sound.findings == ""
    assert "sanity gate" not in repr(sound)
    findings = found("a", kind="negative", action="kept at W8A8") + found("b", "c", "d", "e<1>", "f")
    sick = replace(cfg, provenance={**cfg.provenance, "findings": findings})
    line = "sanity gate: negative (kept at W8A8): a; not_monotone (kept as measured): b, c, d and 2 more"
    assert line in repr(sick).splitlines()
    assert line in sick._repr_html_()
    assert line in sick.report(tmp_path / "report.html").read_text()
    assert line in repr(mpq.load(sick.save(tmp_path / "bits.json")))


def test_json_follows_the_published_schema(cfg):
    schema = json.loads(resources.files("mpq.schema").joinpath("bitconfig-1.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(cfg.to_json()), schema)


def test_provenance_is_complete(cfg):
    provenance = cfg.provenance
    assert provenance["estimator"] == "anchored"
    assert provenance["loss"] == "kl"
    assert provenance["samples"] == 256
    assert len(provenance["model_hash"]) == len(provenance["data_hash"]) == 64
    assert set(provenance["versions"]) == {"mpq", "torch", "numpy", "python"}
    assert {o.name for o in cfg.outside} >= {"bn1", "fc"}


def changed(cfg, *path, value):
    data = json.loads(cfg.to_json())
    place = data
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("schema",), "mpq/bitconfig-2", r"has schema 'mpq/bitconfig-2'; this mpq reads 'mpq/bitconfig-1'"),
        (("schema",), ..., "has schema None"),
        (("layers",), {}, "breaks the schema at layers"),
        (("layers", "fc", "scheme"), "W4A8 ", "contradicts|not a scheme"),
        (("layers", "fc", "scheme"), "W99A8", "layer 'fc': integer formats have 1 to 16 bits"),
        (("layers", "fc", "weight"), "int2", "layer 'fc': scheme .* contradicts"),
        (("layers", "fc", "activation_range"), None, "needs an activation_range"),
        (("layers", "fc", "activation_range"), [1.0, 2.0], "must hold zero"),
        (("layers", "fc", "extra"), 1, "breaks the schema at layers/fc"),
        (("layers", "fc", "activation_range"), [float("-inf"), 1.0], "not JSON: -Infinity is not a finite number"),
        (("layers", "fc", "predicted_loss"), float("nan"), "not JSON: NaN is not a finite number"),
        (("layers", "fc", "activation"), None, "contradicts"),
        (("layers", "fc"), ..., "was changed after mpq wrote it"),
        (("metrics", "size", "value"), -1.0, r"was changed after mpq wrote it .* verify=False"),
        (("metrics",), {}, "breaks the schema at metrics"),
        (("metrics", "size", "float"), 0, "breaks the schema at metrics/size/float"),
        (("metrics", "size", "unit"), 1, "breaks the schema at metrics/size/unit"),
        (("provenance", "weight_range"), "median", "breaks the schema at provenance/weight_range"),
        (("checksum",), ..., "breaks the schema at the top level"),
        (("layers", "fc", "macs"), "many", "breaks the schema at layers/fc/macs"),
        (("provenance", "model_hash"), "abc", "breaks the schema at provenance/model_hash"),
        (("solver", "status"), "proven", "breaks the schema at solver/status"),
    ],
)
def test_tampered_files_are_refused(cfg, tmp_path, path, value, match):
    file = tmp_path / "bad.json"
    file.write_text(changed(cfg, *path, value=value))
    with pytest.raises(ConfigError, match=match):
        mpq.load(file)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "{}"])
def test_files_that_are_no_config(tmp_path, text):
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(ConfigError):
        mpq.load(file)


def test_changed_files_load_on_request_and_layout_does_not_matter(cfg, tmp_path):
    file = tmp_path / "changed.json"
    file.write_text(changed(cfg, "metrics", "size", "value", value=1.0))
    assert mpq.load(file, verify=False).size_bytes == 1.0
    file.write_text(json.dumps(json.loads(cfg.to_json()), indent=4))
    assert mpq.load(file) == cfg
    file.write_text(cfg.to_json().replace('"seed": 0', '"seed": 1e999'))
    with pytest.raises(ConfigError, match="1e999 is not a finite number"):
        mpq.load(file)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        mpq.load(tmp_path / "absent.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="can't be read"):
        mpq.load(tmp_path / "binary")


def test_is_a_mapping_with_readable_reprs(cfg):
    assert len(cfg) == 22
    assert next(iter(cfg)) == "conv1"
    assert "fc" in cfg
    assert cfg.schemes()["fc"] == str(cfg["fc"].scheme)
    assert isinstance(cfg, BitConfig)
    assert "measured accuracy 90.00% (float 95.00%)" in repr(cfg)
    assert "interaction: optimal for avg_bits<=4, gap 0" in repr(cfg)
    assert "<b>W8A8</b>" in cfg._repr_html_()


def test_export_flat_json(cfg, tmp_path):
    path = mpq.export(cfg, "json", tmp_path / "flat.json").path
    data = json.loads(path.read_text())
    assert data["fc"] == {"weight": cfg["fc"].weight.name, "activation": "int8:tensor:asym"}
    with pytest.raises(mpq.MpqError, match="unknown exporter 'nope'; known: json"):
        mpq.export(cfg, "nope", path)
    with pytest.raises(mpq.MpqError, match="exporter 'json' has no option 'colour'; it takes none"):
        mpq.export(cfg, "json", path, colour="red")


def test_a_failed_write_leaves_what_was_there(analysis, tmp_path, monkeypatch):
    config = analysis.allocate("avg_bits<=4")
    path = config.save(tmp_path / "bits.json")
    before = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        analysis.allocate("avg_bits<=3").save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_links_and_devices_are_written_to(analysis, tmp_path):
    config = analysis.allocate("avg_bits<=4")
    (tmp_path / "real.json").write_text("")
    (tmp_path / "link.json").symlink_to("real.json")
    config.save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert mpq.load(tmp_path / "real.json").schemes() == config.schemes()
    assert config.save("/dev/null").is_char_device()
