"""Key-value cache: what attention keeps for each token, its bytes, and the seconds that decoding spends on it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mpq.cost_models.devices import Device, Setting
from mpq.cost_models.workload import calibration_tokens
from mpq.errors import BudgetError, GraphError
from mpq.layers import LayerGraph, LayerSpec
from mpq.quantizers.formats import NumberFormat

# Last part of a projection's name -> what of its output is kept for a token.
_KEPT = {
    "all": r"k|v|k_proj|v_proj|key|value|k_lin|v_lin|wk|wv|to_k|to_v|w_k|w_v|kv|kv_proj|wkv|to_kv|kv_a_proj_with_mqa",
    "fused": r"qkv|qkv_proj|wqkv|c_attn|query_key_value|attn_qkv|to_qkv",
}


@dataclass(frozen=True)
class KvCache:
    """What the attention layers of a network keep.

    Attributes:
        kept: Projection -> elements that it adds for one token: keys, values or both.
        tokens: Tokens of a sample of the calibration data: what a prefill adds where its setting names no number.

    Example:
        >>> cache = KvCache({"h.0.attn.k_proj": 1024, "h.0.attn.v_proj": 1024})
        >>> cache.elements, cache.bytes_per_token(NumberFormat.parse("fp16"))
        (2048, 4096.0)
    """

    kept: Mapping[str, int]
    tokens: float | None = None

    @property
    def elements(self) -> int:
        """Elements of one token, over all layers."""
        return sum(self.kept.values())

    def bytes_per_token(self, fmt: NumberFormat) -> float:
        """Bytes of one token of one sample; each projection's part of a token has its own scales."""
        return sum(fmt.storage_bits((1, count)) for count in self.kept.values()) / 8

    def size_bytes(self, fmt: NumberFormat, setting: Setting) -> float:
        """Bytes of the cache of all samples once the tokens of this call are in it (``tokens``; one when decoding).

        Raises:
            BudgetError: If neither the setting nor the cache knows how many tokens a prefill has.
        """
        new = 1 if setting.phase == "decode" else setting.tokens or self.tokens
        if new is None:
            raise BudgetError("a prefill needs its number of tokens: give the device tokens=N, or the cache `tokens`")
        return self.bytes_per_token(fmt) * setting.batch * (setting.context + new)

    def seconds(self, fmt: NumberFormat, device: Device) -> float:
        """Seconds of one call that go to the cache's traffic with main memory, the same whatever the layers' schemes.

        Every sample writes its new tokens and reads those before: the ``context`` of the device's setting. Reading is
        what grows: one decoding step reads the whole cache (Pope et al., 2022). Keys and values that a
        prefill makes and uses at once stay on the chip.

        Raises:
            BudgetError: If the profile has no memory, or the number of tokens is not known.
        """
        if not device.memory:
            raise BudgetError(f"device {device.name!r} has no figures for memory; `mpq devices` lists those that have")
        bandwidth = device.memory[-1].bandwidth * float(device.figures.get("memory_efficiency", 1.0))
        return self.size_bytes(fmt, device.setting) / bandwidth


def find_kv_cache(graph: LayerGraph) -> KvCache:
    """Find the projections to keys and values by their names and shapes.

    A separate projection is kept whole. Of a fused one, its queries are not: they are as wide as its input, which holds
    for grouped queries too as long as heads times head size is the width of the network. A projection that runs several
    times in a call, as one shared by all layers does, is kept each time.

    Raises:
        GraphError: If there are none, or a fused projection is too narrow for the rule.
    """
    kept = {layer.name: _kept(layer) * layer.calls for layer in graph}
    found = {name: count for name, count in kept.items() if count}
    if not found:
        raise GraphError(
            "no projection to keys or values found: none of the linear layers is called k_proj, v_proj, key, value, "
            "qkv, c_attn, in_proj or the like; make `KvCache({name: elements per token})` yourself"
        )
    return KvCache(found, calibration_tokens([graph[name] for name in found]))


def asked_cache(graph: LayerGraph, setting: Setting) -> tuple[KvCache | None, str]:
    """The cache that a setting asks for, None where it has no context and decodes nothing; and why one is missing."""
    if setting.phase == "prefill" and not setting.context:
        return None, ""
    try:
        return find_kv_cache(graph), ""
    except GraphError as error:
        return None, f"no key-value cache is counted: {error}" if setting.context else ""


def _kept(layer: LayerSpec) -> int:
    """Elements of a layer's output for one token that go to the cache."""
    if layer.op not in ("linear", "attention_in_proj"):
        return 0
    last = layer.name.rsplit(".", 1)[-1].lower()
    outputs, inputs = layer.rows_shape[0], math.prod(layer.rows_shape[1:])
    if re.fullmatch(_KEPT["all"], last):
        return outputs
    if layer.op != "attention_in_proj" and not re.fullmatch(_KEPT["fused"], last):
        return 0
    if outputs <= inputs:
        raise GraphError(
            f"layer {layer.name!r} looks like a fused projection to queries, keys and values, but its {outputs} "
            f"outputs are not more than its {inputs} inputs; make `KvCache({{name: elements per token}})` yourself"
        )
    return outputs - inputs
