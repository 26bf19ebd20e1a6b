"""Whole models in files: bit for bit, in the bytes foretold, and nothing taken on trust."""

import json
import zlib
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import mpq
from mpq.corrections import add_noise_bias, correct_bias, reestimate_batch_norm
from mpq.errors import ConfigError, FormatError, GraphError
from mpq.packed import packed_bytes
from mpq.packed_file import PackedFile


class Small(nn.Module):
    """Attention, a transposed convolution, tied weights, a buffer that is kept and one that is not."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Embedding(40, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.norm = nn.ConvTranspose1d(16, 16, 2, groups=4), nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("left", torch.arange(9.0), persistent=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(self.up(x.transpose(1, 2))).transpose(1, 2))


SCHEMES = "Wnf4:g8Afp8_e4m3,W4A8:token,Wternary:tensor,W16,Wnvfp4Amxfp8_e4m3,W3:asymA8:g8"


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    net = Small().eval()
    tokens = torch.randint(0, 40, (4, 6))
    pins = dict(zip(["embed", "attention.in_proj", "attention.out_proj", "up"], SCHEMES.split(",")[:4], strict=True))
    cfg = mpq.allocate(net, [tokens], "size<=90%", SCHEMES, pin=pins, progress=False)
    return net, tokens, cfg


def same(a, b):
    states = a.state_dict(), b.state_dict()
    states = [{k: t for k, t in s.items() if not k.endswith("num_batches_tracked")} for s in states]
    return list(states[0]) == list(states[1]) and all(torch.equal(x, states[1][k]) for k, x in states[0].items())


def test_a_model_comes_back_bit_for_bit(small, tmp_path):
    net, tokens, cfg = small
    path = mpq.save_quantized(net, cfg, tmp_path / "net.safetensors")
    fresh = Small().eval()
    back, expected = mpq.load_quantized(fresh, path), mpq.quantize(net, cfg)
    assert same(back, expected)
    assert back.head.weight is back.embed.weight
    with torch.no_grad():
        assert torch.equal(back(tokens), expected(tokens))
    assert not same(mpq.quantize(fresh, cfg, strict=False), expected)  # nothing of the other weights is left
    sizes = packed_bytes(path)
    assert sum(sizes.values()) == path.stat().st_size
    assert sizes == mpq.packed_size(net, cfg) == mpq.packed_size(expected, cfg)
    assert sizes["buffers"] == 4 * (3 + 16 + 16)
    assert cfg.size_bytes - 5 * len(cfg) <= sizes["parameters"] <= cfg.size_bytes + 2 * len(cfg)
    file = PackedFile(path)
    assert file.config == cfg
    assert file.layout["up.weight"] == (torch.float16, (16, 4, 2))  # W16 is kept whole


def test_configs_with_new_formats_round_trip(small, tmp_path):
    net, tokens, cfg = small
    assert {"Wnf4:g8", "W4A8:token", "Wternary:tensor", "W16"} <= set(cfg.schemes().values())
    assert mpq.load(cfg.save(tmp_path / "cfg.json")) == cfg
    with torch.no_grad():
        assert torch.isfinite(mpq.quantize(net, cfg)(tokens)).all()


@pytest.mark.parametrize(
    "scheme",
    ["Wfp10_e5m4A8", "Wfp12_e8m3Afp12_e8m3", "Wfp16_e6m9:g8Afp9_e4m4:token", "Wfp9_e4m4:gptqA8", "W8Afp12_e5m6"],
)
def test_minifloats_of_any_width_are_chosen_stored_and_read_in_the_bytes_foretold(scheme, tmp_path):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 3)), torch.randn(6, 24)
    cfg = mpq.allocate(net, x, "energy<=100%", [scheme], progress=False)
    assert set(cfg.schemes().values()) == {scheme}
    data = {"calib": x} if "gptq" in scheme else {}
    expected = mpq.quantize(net, cfg, **data)
    path = mpq.save_quantized(net, cfg, tmp_path / "a", **data)
    assert packed_bytes(path) == mpq.packed_size(net, cfg)
    assert same(mpq.load_quantized(net, path), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_types_come_back(dtype, tmp_path):
    net = nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 3)).to(dtype)
    cfg = mpq.allocate(net, torch.randn(6, 24, dtype=dtype), "avg_bits<=5", "W4:g8,Wnf4,Wnvfp4", progress=False)
    path = mpq.save_quantized(net, cfg, tmp_path / "a")
    assert same(mpq.load_quantized(net, path), mpq.quantize(net, cfg))
    other = nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 3))
    with pytest.raises(ConfigError, match=r"tensor '0.bias' is torch.\w+ \[8\], but must be torch.float32 \[8\]"):
        mpq.load_quantized(other, path)


def test_the_bundled_network_takes_the_bytes_that_its_config_says(example, analysis, tmp_path):
    cfg = analysis.allocate("size<=13%")
    path = mpq.save_quantized(example[0], cfg, tmp_path / "a")
    assert packed_bytes(path)["parameters"] == pytest.approx(cfg.size_bytes, rel=1e-3)
    assert same(mpq.load_quantized(example[0], path), mpq.quantize(example[0], cfg))


def rewritten(path, out, tensors=(), config=None, drop=(), **metadata):
    """The file with other content, as somebody might forge it."""
    with safe_open(path, "pt") as file:
        head, data = json.loads(zlib.decompress(file.get_tensor("head").numpy().tobytes())), PackedFile(path).tensors()
        metadata = file.metadata() | metadata
    data = {k: v for k, v in (data | dict(tensors)).items() if k not in drop}
    data = dict(sorted(data.items(), key=lambda entry: -entry[1].itemsize))
    head["config"] |= config or {}
    head["tensors"] = {k: [str(t.dtype).removeprefix("torch."), list(t.shape)] for k, t in data.items()}
    packed = torch.frombuffer(bytearray(zlib.compress(json.dumps(head).encode())), dtype=torch.uint8)
    flat = torch.cat([t.contiguous().reshape(-1).view(torch.uint8) for t in data.values()])
    save_file({"head": packed, "data": flat}, out, metadata)
    return out


def test_files_are_not_trusted(small, tmp_path):
    net, _, cfg = small
    path = mpq.save_quantized(net, cfg, tmp_path / "a")
    tensors = PackedFile(path).tensors()
    assert same(mpq.load_quantized(net, rewritten(path, tmp_path / "same")), mpq.quantize(net, cfg))

    def says(match, changes=(), **options):
        with pytest.raises(ConfigError, match=match):
            mpq.load_quantized(net, rewritten(path, tmp_path / "b", changes, **options))

    says("tensor 'norm.bias' is missing", drop=["norm.bias"])
    says("tensor 'extra' is not in the model", {"extra": torch.ones(1)})
    says("tensor 'embed.weight:more' is not in the model or not in its format", {"embed.weight:more": torch.ones(1)})
    says("tensor 'kept' is torch.float32 \\[4\\], but must be torch.float32 \\[3\\]", {"kept": torch.ones(4)})
    says("tensor 'up.weight' is torch.float32", {"up.weight": tensors["up.weight"].float()})
    says("tensor 'embed.weight:codes' is", {"embed.weight:codes": tensors["embed.weight:codes"][1:]})
    says("tensor 'embed.weight' in nf4:g8: scale holds", {"embed.weight:scale": -tensors["embed.weight:scale"]})
    says("is no packed model: its format is 'x'", format="x")
    says("the config in .* was changed", config={"budgets": ["size<=1%"]})
    with pytest.raises(ConfigError, match="no packed model"):
        mpq.load_quantized(net, tmp_path / "none")
    (tmp_path / "c").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="no packed model"):
        mpq.load_quantized(net, tmp_path / "c")
    with pytest.raises(ConfigError, match="of its 5 layers are not in Linear"):
        mpq.load_quantized(nn.Linear(2, 2), path)
    with pytest.raises(ConfigError, match="quantized already"):
        mpq.load_quantized(mpq.quantize(net, cfg), path)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"nonsense", "is damaged: Error -3"),
        (zlib.compress(b"{}")[:-5], "is damaged: its head is cut short"),
        (zlib.compress(b"{"), "is damaged: Expecting"),
        (zlib.compress(b"{}"), "is damaged: its head has 'config' is a required property"),
        (zlib.compress(b'{"config": {}, "buffers": [], "tensors": {"a": ["object", [1]]}}'), "'object' is not one of"),
        (zlib.compress(b'{"config": {}, "buffers": [], "tensors": {"a": ["int8", [-1]]}}'), "less than the minimum"),
        (zlib.compress(b'{"config": {}, "buffers": [], "tensors": {"a": ["int8", [4.0]]}}'), r"the shape \[4.0\] of"),
        (zlib.compress(b'{"config": {}, "buffers": ["nope"], "tensors": {}}'), "buffer 'nope', which is no tensor"),
        (zlib.compress(b'{"config": {}, "buffers": ["a", "a"], "tensors": {"a": ["int8", [4]]}}'), "non-unique"),
    ],
)
def test_heads_are_not_trusted(head, says, tmp_path):
    tensors = {"head": torch.frombuffer(bytearray(head), dtype=torch.uint8), "data": torch.zeros(1, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "a", {"format": "mpq/packed-2"})
    with pytest.raises(ConfigError, match=says):
        packed_bytes(tmp_path / "a")


def test_a_missing_folder_is_named(small, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere/a can't be written"):
        mpq.save_quantized(small[0], small[2], tmp_path / "nowhere" / "a")


def test_weights_that_are_not_finite_are_refused_by_name(small, tmp_path):
    broken = Small().eval()
    broken.up.weight.data[0, 0, 0] = torch.nan
    with pytest.raises(GraphError, match=r"layer 'up' holds NaN or infinity"):
        mpq.quantize(broken, small[2], strict=False)
    with pytest.raises(GraphError, match=r"layer 'up' holds NaN or infinity"):
        mpq.save_quantized(broken, small[2], tmp_path / "a", strict=False)


FORMATS = """
    int1 int3 int4 int8 int11 int16 int2:asym int4:tensor int4:g3 int4:b2x3 bfp4 int4:bipolar fp8_e5m2:g8 fp6_e2m3:raw
    mxfp4 mxint8 nvfp4 nf4:g64 pow2_3 post_4 ternary binary kmeans_3 nupes_3:g8 pvq_2:g4 int4:nested int8:cross
    int4:g8:progressive int4:gptq int3:g8:adaround nf4:awq int4:smooth:gptq int4:hadamard int4:lorc2 int4:qera2
    int4:svd2:lorc1 int4:sparse5 int4:ocs10 int4:split3 fp16 bf16 fp32
    """.split()  # noqa: SIM905


class Net(nn.Module):
    """Convolutions in groups, transposed ones, a batch norm, an embedding and a linear layer without bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 24, 3, stride=2, groups=4)
        self.up = nn.ConvTranspose2d(24, 12, 3, 2, groups=2)
        self.fc, self.places = nn.Linear(12, 10, bias=False), nn.Embedding(4, 10)

    def forward(self, x):
        x = self.up(self.grouped(self.norm(self.first(x)).relu()).relu()).relu()
        return self.fc(x.mean((2, 3))) + self.places(torch.zeros(len(x), dtype=torch.long))


@pytest.fixture(scope="module")
def net():
    rng = torch.Generator().manual_seed(1)
    return Net().eval(), [torch.randn(16, 3, 10, 10, generator=rng) for _ in range(2)]


def uniform(model, calib, scheme, **options):
    options = {"estimator": "weight_sqnr", "weight_range": "minmax", "progress": False} | options
    return mpq.analyze(model, calib, scheme, **options).uniform(scheme)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_foretold_and_comes_back(net, name, tmp_path):
    model, calib = net
    cfg = uniform(model, calib, f"W{name}".replace("Wfp16", "W16").replace("Wfp32", "W32"))
    quantized = mpq.quantize(model, cfg, calib=calib)
    path = mpq.save_quantized(quantized, cfg, tmp_path / "a")
    assert packed_bytes(path) == mpq.packed_size(model, cfg)
    assert sum(packed_bytes(path).values()) == path.stat().st_size
    back = mpq.load_quantized(Net().eval(), path)
    assert same(back, quantized)
    again = mpq.save_quantized(back, cfg, tmp_path / "b")  # codes are kept again
    assert again.read_bytes() == path.read_bytes()
    with torch.no_grad():
        assert torch.equal(back(calib[0]), quantized(calib[0]))


def test_rounded_with_an_eye_to_data_from_the_float_model(net, tmp_path):
    model, calib = net
    cfg = uniform(model, calib, "W3:gptqA8")
    with pytest.raises(FormatError, match="pass calib="):
        mpq.save_quantized(model, cfg, tmp_path / "a")
    path = mpq.save_quantized(model, cfg, tmp_path / "a", calib=calib)
    assert same(mpq.load_quantized(model, path), mpq.quantize(model, cfg, calib=calib))


def test_corrected_models_come_back(net, tmp_path):
    model, calib = net
    cfg = uniform(model, calib, "W3:gptqA4")
    quantized = correct_bias(mpq.quantize(model, cfg, calib=calib), model, calib)
    quantized = add_noise_bias(reestimate_batch_norm(quantized, calib), calib)
    assert quantized.first.bias is not None
    assert quantized.fc.input_quantizer.noise is not None
    path = mpq.save_quantized(quantized, cfg, tmp_path / "a")
    back = mpq.load_quantized(model, path)
    assert same(back, quantized)
    with torch.no_grad():
        assert torch.equal(back(calib[1]), quantized(calib[1]))
    assert packed_bytes(path) == mpq.packed_size(quantized, cfg)


def test_corrections_in_files_are_not_trusted_and_go_where_the_model_is(net, tmp_path):
    model, calib = net
    cfg = uniform(model, calib, "W4A4")
    quantized = add_noise_bias(correct_bias(mpq.quantize(model, cfg), model, calib), calib)
    path, noise = mpq.save_quantized(quantized, cfg, tmp_path / "a"), "fc.input_quantizer.noise"
    for name, forged, fits in (
        ("fc.bias", torch.zeros(5), r"torch.float32 \[5\], but must be torch.float32 \[10\]"),
        ("first.bias", torch.zeros(16, dtype=torch.int8), r"torch.int8 \[16\], but must be torch.float32 \[16\]"),
        (noise, torch.zeros(3), r"torch.float32 \[3\], but must be torch.float32 \[12\]"),
        (noise, torch.zeros(12, dtype=torch.int8), r"torch.int8 \[12\], but must be torch.float32 \[12\]"),
    ):
        with pytest.raises(ConfigError, match=f"tensor '{name}' is {fits}"):
            mpq.load_quantized(model, rewritten(path, tmp_path / "b", {name: forged}))
    back = mpq.load_quantized(Net().to("meta"), path)
    tensors = [*back.parameters(), *back.buffers()]
    assert back.fc.input_quantizer.noise is not None
    assert back.fc.bias is not None
    assert {t.device.type for t in tensors} == {"meta"}


def test_models_that_are_not_of_the_config_are_refused(net, tmp_path):
    model, calib = net
    cfg, other = uniform(model, calib, "W4A8"), uniform(model, calib, "W3A8")
    quantized = mpq.quantize(model, cfg)
    with pytest.raises(ConfigError, match="by another config: layer 'first' is int4, not int3"):
        mpq.save_quantized(quantized, other, tmp_path / "a")
    moved = replace(cfg["fc"], activation_range=(-9.0, 9.0))
    with pytest.raises(ConfigError, match="layer 'fc' rounds its inputs otherwise"):
        mpq.save_quantized(quantized, replace(cfg, layers={**cfg.layers, "fc": moved}), tmp_path / "a")
    with pytest.raises(ConfigError, match="quantized already"):
        mpq.quantize(quantized, cfg)
    quantized.up.weight.data[0, 0, 0, 0] += 1
    with pytest.raises(ConfigError, match="weight of layer 'up' was changed after"):
        mpq.save_quantized(quantized, cfg, tmp_path / "a")
    assert not (tmp_path / "a").exists()


REAL = {
    "resnet20": "W4A8,W8A8",
    "mobilenetv2": "W4A8,W3:hadamardA8",
    "efficientnet_lite0": "W4A8,W8A8",
    "minilm": "W4:g64,Wnf4:lorc8",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_files_of_real_models_are_foretold_with_small_heads(name, shared_loaders, mixed, tmp_path):
    model, calib, _ = shared_loaders[name]()
    cfg = mixed(model, calib[:1], REAL[name])
    path = mpq.save_quantized(model, cfg, tmp_path / "a")
    sizes, told = packed_bytes(path), mpq.packed_size(model, cfg)
    print(name, sizes, f"size {cfg.size_bytes:,.0f}")
    assert path.stat().st_size == sum(told.values())
    assert sizes == told
    inputs = [fmt for choice in cfg.values() if (fmt := choice.activation) is not None and fmt.calibrated]
    of_inputs = sum(fmt.scale_bits // 8 + (0 if fmt.symmetric else 1) for fmt in inputs)  # which the head holds
    assert sizes["parameters"] == pytest.approx(cfg.size_bytes - of_inputs, rel=1e-3)
    assert sizes["header"] < 12_000
    assert same(mpq.load_quantized(model, path), mpq.quantize(model, cfg))
