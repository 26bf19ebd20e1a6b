"""llama.cpp's own library, as its binding for Node ships it, through ctypes; `.ci/test-exports` fetches it."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import gguf

FOLDER = Path(sys.prefix) / "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64"
Q8_0 = 7  # of llama_ftype


class Override(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


class Parameters(ctypes.Structure):
    """``llama_model_quantize_params`` of llama.h."""

    _fields_ = (
        *((n, ctypes.c_int) for n in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        *((n, ctypes.c_bool) for n in ("requantize", "output", "only_copy", "pure", "keep_split", "dry_run")),
        *((n, ctypes.c_void_p) for n in ("imatrix", "kv_overrides")),
        ("tt_overrides", ctypes.POINTER(Override)),
        ("prune_layers", ctypes.c_void_p),
    )


def quantize(source: Path, target: Path, rules: str) -> dict[str, str]:
    """Quantize a GGUF file as ``llama-quantize --tensor-type-file`` does; returns the types of its tensors."""
    ggml, llama = (
        ctypes.CDLL(str(next(FOLDER.glob(n))), mode=ctypes.RTLD_GLOBAL) for n in ("libggml.v*", "libllama.v*")
    )
    ggml.ggml_backend_load_all_from_path(str(FOLDER).encode())
    llama.llama_model_quantize_default_params.restype = Parameters
    llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
    parameters = llama.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype = 1, Q8_0
    pairs = [rule.rsplit("=", 1) for rule in rules.split()]
    types = [int(gguf.GGMLQuantizationType[kind.upper()]) for _, kind in pairs]
    overrides = [Override(pattern.lower().encode(), kind) for (pattern, _), kind in zip(pairs, types, strict=True)]
    parameters.tt_overrides = (Override * (len(pairs) + 1))(*overrides)  # the last is empty
    assert llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)) == 0
    return {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(target).tensors}


def write_float(model, path: Path) -> None:
    """A tiny Llama as a GGUF file without a vocabulary."""
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight",)), value.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
