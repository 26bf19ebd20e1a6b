"""A tiny Llama for the exporters of language models."""

from __future__ import annotations

import torch

import mpq
from mpq.quantizers import Scheme


def tiny_llama(dtype=torch.bfloat16, **options):
    """Two layers of random weights: 128 features, 2 key-value heads of 32, an MLP of 256."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **options})
    return LlamaForCausalLM(config).to(dtype).eval()


def tokenizer():
    """One word for each token of the tiny Llama."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1", eos_token="w2")


def tokens():
    return [{"input_ids": torch.arange(24).reshape(2, 12) % 96}]


def analysed(model, schemes, runtime=None, skip=("model.embed_tokens", "lm_head"), **options):
    return mpq.analyze(
        model, tokens(), schemes, estimator="weight_sqnr", runtime=runtime, skip=skip, progress=False, **options
    )


def mixed(analysis, choose):
    """A config of an analysis: ``choose`` maps the name of a group's first layer to a scheme."""
    wanted = [Scheme.parse(choose(g.name)) for g in analysis.space.groups]
    return analysis.config([analysis.space.schemes.index(s) for s in wanted])


def by_projection(schemes):
    """Layer name -> scheme, by the short name of its projection (``q`` for ``...q_proj``)."""
    return lambda name: schemes[name.rpartition(".")[2].removesuffix("_proj")]
