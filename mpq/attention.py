"""``nn.MultiheadAttention`` with its projections as modules, so that they can be found, observed and quantized."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

_SPLIT = ("q_proj", "k_proj", "v_proj")


class PackedProjection(nn.Module):
    """Query, key and value projections that share one weight ``[3 * embed, embed]``."""

    weight: Tensor

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project the three inputs, in one product if they are the same tensor."""
        if query is key and key is value:
            q, k, v = F.linear(query, self.weight, self.bias).chunk(3, -1)
            return q, k, v
        weights = self.weight.chunk(3)
        biases = self.bias.chunk(3) if self.bias is not None else (None, None, None)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return q, k, v


class ExplicitAttention(nn.MultiheadAttention):
    """Same weights and same result as the attention it is made from, computed through child modules.

    ``in_proj`` (`PackedProjection`) or ``q_proj``, ``k_proj``, ``v_proj`` (where their input widths differ), and
    ``out_proj``. The parameters are shared with the original.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        # A mark that sends nn.TransformerEncoderLayer round its fused path, which reads packed weights only.
        self._qkv_same_embed_dim = False
        for name in ("embed_dim", "num_heads", "head_dim", "dropout", "batch_first", "kdim", "vdim"):
            setattr(self, name, getattr(original, name))
        self.bias_k = self.bias_v = None
        self.add_zero_attn = False
        self.training = original.training
        bias = original.in_proj_bias
        if original._qkv_same_embed_dim:
            self.in_proj = PackedProjection(original.in_proj_weight, bias)
        else:
            parts = bias.detach().chunk(3) if bias is not None else (None, None, None)
            for name, part in zip(_SPLIT, parts, strict=True):
                self.add_module(name, _linear(getattr(original, f"{name}_weight"), part))
        self.register_parameter("in_proj_weight", None)
        self.register_parameter("in_proj_bias", None)
        self.add_module("out_proj", _linear(original.out_proj.weight, original.out_proj.bias))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention as in ``nn.MultiheadAttention.forward``."""
        q, k, v = self._project(query, key, value)
        batched = q.dim() == 3
        if not batched:
            q, k, v = q[None], k[None], v[None]
        elif not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        q, k, v = (t.reshape(*t.shape[:2], self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout)
            context = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            context = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out: Tensor = self.out_proj(context.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], weights
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = self._modules.get("in_proj")
        if packed is not None:
            q, k, v = packed(query, key, value)
        else:
            q, k, v = (self.get_submodule(n)(x) for n, x in zip(_SPLIT, (query, key, value), strict=True))
        return q, k, v

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one additive mask that broadcasts to ``[batch, heads, queries, keys]``."""
        total = None
        if attn_mask is not None:
            total = F._canonical_mask(attn_mask, "attn_mask", None, "", q.dtype, False)
            if total is not None and total.dim() == 3:
                total = total.view(len(q), self.num_heads, q.shape[1], k.shape[1])
        if padding is not None:
            extra = F._canonical_mask(padding, "key_padding_mask", None, "", q.dtype, False)
            assert extra is not None
            extra = extra.view(len(q), 1, 1, k.shape[1])
            total = extra if total is None else total + extra
        return total


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer that shares the given parameters."""
    layer = nn.Linear(1, 1, bias=bias is not None, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, weight.requires_grad)
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, weight.requires_grad)
    return layer


def expand_attention(model: nn.Module, done: dict[int, nn.Module] | None = None) -> nn.Module:
    """Replace every plain ``nn.MultiheadAttention`` below a module, in place; returns the module.

    Left alone: subclasses (their forward is unknown) and attentions with ``bias_k`` or ``add_zero_attn``.

    Args:
        model: Where to look.
        done: Modules that were visited, so that one used in several places stays one.
    """
    done = {} if done is None else done
    if id(model) in done:
        return done[id(model)]
    if type(model) is nn.MultiheadAttention and model.bias_k is None and not model.add_zero_attn:
        done[id(model)] = ExplicitAttention(model)
        return done[id(model)]
    done[id(model)] = model
    for name, child in list(model._modules.items()):
        if child is not None:
            model._modules[name] = expand_attention(child, done)
    return model
