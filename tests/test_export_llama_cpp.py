"""llama.cpp: names, types and shapes checked with ``gguf``, and by the library itself where it is installed. What the
program does before it calls the library (lower case, split at ``=``) is rebuilt from its source."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from configs import with_scheme
from llama import analysed, by_projection, mixed, tiny_llama

import mpq
from mpq.errors import ExportError

pytest.importorskip("transformers", reason="needs transformers")
gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'mpq[export-llama-cpp]'")

SCHEMES = {
    "embed_tokens": "W8:g32",
    "q": "W4:g32",
    "k": "W5:g32",
    "v": "W8:g32",
    "o": "W4:g32:asym",
    "gate": "Wmxfp4",
    "up": "W5:g32:asym",
    "down": "W3:g16",
}


TYPES = {  # of llama.cpp
    "embed_tokens": "q8_0",
    "q": "q4_0",
    "k": "q5_0",
    "v": "q8_0",
    "o": "q4_1",
    "gate": "mxfp4",
    "up": "q5_1",
    "down": "q3_k",
}


scheme_of = by_projection(SCHEMES)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(torch.float32)


@pytest.fixture(scope="module")
def config(model):
    return mixed(analysed(model, ",".join(SCHEMES.values()), "llama.cpp", skip=["lm_head"]), scheme_of)


def llama_cpp_type(tensor, text):
    """What llama-quantize takes for a tensor."""
    rules = [line.split("=") for line in text.split()]
    return next((t for pattern, t in rules if re.search(pattern.lower(), tensor)), None)


def test_every_tensor_has_its_type(model, config, tmp_path):
    path = tmp_path / "types.txt"
    exported = mpq.export(config, "llama.cpp", path, model)
    text = path.read_text()
    assert text == text.lower()
    expected = {
        "token_embd": "q8_0",
        "blk.0.attn_q": "q4_0",
        "blk.1.attn_k": "q5_0",
        "blk.1.attn_v": "q8_0",
        "blk.0.attn_output": "q4_1",
        "blk.0.ffn_gate": "mxfp4",
        "blk.1.ffn_up": "q5_1",
        "blk.0.ffn_down": "q3_k",
        "output": "f16",
    }
    assert {t: llama_cpp_type(f"{t}.weight", text) for t in expected} == expected
    assert llama_cpp_type("blk.10.attn_q.weight", text) == "f16"  # the last line, which norms have no heed of
    assert len(text.splitlines()) == 17
    for name, choice in config.items():
        kind = re.search(r" as (\w+);", exported.layers[name][1])[1].upper()
        block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        assert choice.weight_shape[1] % block == 0
    assert exported.layers["model.layers.0.self_attn.q_proj"][0] == "exact"
    assert exported.layers["model.layers.0.mlp.down_proj"][0] == "approximated"


@pytest.fixture(scope="module")
def library():
    import llama_cpp_library

    if not llama_cpp_library.FOLDER.is_dir():
        pytest.skip("needs llama.cpp: make test-exports TOOLS=llama-cpp")
    return llama_cpp_library


def test_llama_cpp_gives_every_tensor_its_type(library, model, config, tmp_path):
    path = tmp_path / "types.txt"
    mpq.export(config, "llama.cpp", path, model)
    library.write_float(model, tmp_path / "in.gguf")
    found = library.quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", path.read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name in config:
        assert found.pop(f"{names.get_name(name)}.weight") == TYPES[name.split(".")[-1].removesuffix("_proj")]
    assert found.pop("output.weight") == "f16"
    assert set(found.values()) == {"f32"}  # norms
    again = mpq.import_config("llama.cpp", tmp_path / "out.gguf", model, progress=False)
    assert again.schemes() == config.schemes()


def test_llama_cpp_alone_takes_other_types_for_such_shapes(library, model, tmp_path):
    library.write_float(model, tmp_path / "in.gguf")
    rules = r"^blk\.0\.attn_q\.weight$=q4_k ^blk\.0\.attn_k\.weight$=q3_k ffn_down=q6_k"
    found = library.quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", rules)
    assert found["blk.0.attn_q.weight"] == "q5_0"  # 128 features are no blocks of 256
    assert found["blk.0.attn_k.weight"] == "q4_0"
    assert {found[f"blk.{i}.ffn_down.weight"] for i in range(2)} == {"q6_k"}  # a part of a name is enough
    assert found["blk.0.attn_v.weight"] == "q8_0"  # without a line it has the base type
    found = library.quantize(tmp_path / "in.gguf", tmp_path / "other.gguf", rf"{rules} .*=f16")
    assert {found["blk.0.attn_v.weight"], found["token_embd.weight"]} == {"f16"}


def test_our_codes_fit_the_blocks_of_gguf(model, config, tmp_path):
    """A file with our codes as q4_0 and q8_0 blocks, read back by gguf, has our values."""
    from mpq.export.packed import by_row, layer_codes

    ours = mpq.quantize(model, config)
    for part, kind in (("q_proj", "Q4_0"), ("v_proj", "Q8_0")):
        name = f"model.layers.0.self_attn.{part}"
        codes, scale, _ = by_row(layer_codes(config, model, name))
        groups = codes.reshape(-1, 32).numpy()
        packed = (groups[:, :16] + 8) | (groups[:, 16:] + 8) << 4 if kind == "Q4_0" else groups
        half = scale.reshape(-1, 1).numpy().astype(np.float16).view(np.uint8)
        blocks = np.concatenate([half, packed.astype(np.int8).view(np.uint8)], 1).reshape(len(codes), -1)
        writer = gguf.GGUFWriter(tmp_path / f"{kind}.gguf", "llama")
        writer.add_tensor("blk.0.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        tensor = gguf.GGUFReader(tmp_path / f"{kind}.gguf").tensors[0]
        assert tensor.tensor_type.name == kind
        held = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(held, ours.get_submodule(name).weight)


def test_shapes_that_llama_cpp_would_change_are_refused(config, model, tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(ExportError, match="input features that are multiples of 256 for W3:g16, not 128"):
        mpq.export(with_scheme(config, name, "W3:g16"), "llama.cpp", tmp_path / "x", model)
    analysis = analysed(model, "W3:g16,W4:g32", "llama.cpp", skip=["lm_head", "model.embed_tokens"])
    column = [str(s) for s in analysis.space.schemes].index("W3:g16")
    allowed = {g.name for g, row in zip(analysis.space.groups, analysis.space.allowed, strict=True) if row[column]}
    assert allowed == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}


def test_experts_are_one_tensor(config, tmp_path):
    choice = config["model.layers.0.mlp.up_proj"]
    experts = {f"model.layers.1.mlp.experts.{e}.up_proj": choice for e in (0, 1)}
    mpq.export(replace(config, layers=experts), "llama.cpp", tmp_path / "x", architecture="qwen3moe")
    lines = (tmp_path / "x").read_text().splitlines()
    assert [line for line in lines if "exps" in line] == [r"^blk\.1\.ffn_up_exps\.weight$=q5_1"]


@pytest.mark.filterwarnings("ignore:only .* of the parameters")
def test_what_mpq_does_not_quantize_stays_float(tmp_path):
    """llama-quantize gives its base type to all that no line is about, such as the products of GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=1, n_head=2)).eval()
    config = mixed(analysed(model, "W4:g32", "llama.cpp", skip=["transformer.wpe"]), lambda _: "W4:g32")
    exported = mpq.export(config, "llama.cpp", tmp_path / "x", model)
    text = (tmp_path / "x").read_text()
    assert llama_cpp_type("token_embd.weight", text) == "q4_0"
    assert llama_cpp_type("blk.0.attn_qkv.weight", text) == "f16"
    floats = {n for n, (status, _) in exported.layers.items() if status == "left float"}
    blocks = {f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert floats == {*blocks, "transformer.wpe"}


def test_names_need_an_architecture(config, model, tmp_path):
    with pytest.raises(ExportError, match="pass a model of transformers or architecture='llama'"):
        mpq.export(config, "llama.cpp", tmp_path / "x")
    with pytest.raises(ExportError, match="GGUF has no architecture 'lama'"):
        mpq.export(config, "llama.cpp", tmp_path / "x", architecture="lama")
    odd = replace(config, layers={"vision.tower": next(iter(config.layers.values()))})
    with pytest.raises(ExportError, match=r"layer 'vision.tower' has no name in GGUF"):
        mpq.export(odd, "llama.cpp", tmp_path / "x", architecture="llama")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("scheme", ["W4", "W4A8", "W4:g64", "Wnf4", "W7:g32"])
def test_unsupported_pairs_are_refused(config, tmp_path, scheme):
    with pytest.raises(ExportError, match=re.escape(f"has {scheme}, but llama.cpp has no {scheme}")):
        mpq.export(with_scheme(config, "model.layers.0.mlp.up_proj", scheme), "llama.cpp", tmp_path / "x")
