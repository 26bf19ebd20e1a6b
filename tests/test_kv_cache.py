"""Size and traffic of the key-value cache."""

from dataclasses import replace

import pytest
from cost_layers import graph, linear

from mpq.cost_models import find_device
from mpq.cost_models.devices import Setting
from mpq.cost_models.kv_cache import KvCache, find_kv_cache
from mpq.cost_models.latency import latency
from mpq.cost_models.memory import resident_bytes
from mpq.errors import BudgetError, GraphError
from mpq.quantizers import NumberFormat
from mpq.space import make_space


def test_kv_cache_by_hand():
    """Llama-2-7B: 32 layers, 4096 wide, fp16: half a megabyte for each token."""
    names = [f"layers.{i}.self_attn.{p}_proj" for i in range(32) for p in "qkv"]
    cache = find_kv_cache(graph(*(linear(4096, 4096, name=n) for n in names)))
    fp16, int8, grouped = (NumberFormat.parse(f) for f in ("fp16", "int8", "int4:g64:asym"))
    assert cache.elements == 2 * 32 * 4096
    assert cache.bytes_per_token(fp16) == 512 * 1024
    assert cache.bytes_per_token(int8) == 2 * 32 * (4096 + 4)  # a scale for each token and projection
    assert cache.bytes_per_token(grouped) == 2 * 32 * (4096 / 2 + 64 * (16 + 4) / 8)
    assert cache.size_bytes(fp16, Setting(4, "decode", None, 999)) == 4 * 1000 * 512 * 1024
    device = find_device("a100:decode:context=2047:batch=2")
    assert cache.seconds(fp16, device) == pytest.approx(2 * 2048 * 512 * 1024 / (2.039e12 * 0.85))
    assert cache.seconds(fp16, device) > cache.seconds(int8, device) > cache.seconds(grouped, device)


def test_latency_and_resident_bytes_hold_the_cache():
    layers = [replace(linear(64, 64, 10, f"h.0.{n}_proj"), storage=i, source=i) for i, n in enumerate("qkv")]

    def costs(device, *found):
        space = make_space(graph(*(found or layers)), "W8A8", device=find_device(device))
        return latency(space), resident_bytes(space)

    token = 2 * 64 * 2  # bytes of keys and values in fp16
    bandwidth = 2.039e12 * 0.85
    for at, tokens in (("decode", 1), ("decode:context=1000000", 1_000_001), ("batch=2:context=5", 2 * (5 + 10))):
        seconds, held = costs(f"a100:{at}")
        assert seconds.constant == pytest.approx(tokens * token / bandwidth)
        assert held.constant == tokens * token
        assert held.notes == (f"{tokens * token:,} bytes of it are the key-value cache in fp16",)
        assert "traffic of the key-value cache in fp16" in seconds.notes[-1]
    assert [c.constant for c in costs("a100:batch=2")] == [0, 0]
    for cost in costs("a100:decode:context=7", linear(64, 64, name="up")):
        assert cost.constant == 0
        assert cost.notes[-1].startswith("no key-value cache is counted: no projection to keys or values found")


def test_a_prefill_adds_its_traced_tokens():
    fp16 = NumberFormat.parse("fp16")
    cache = find_kv_cache(graph(linear(8, 8, 12, "k_proj")))
    assert cache.size_bytes(fp16, Setting()) == 12 * 8 * 2
    assert cache.size_bytes(fp16, Setting(tokens=3)) == 3 * 8 * 2
    with pytest.raises(BudgetError, match="a prefill needs its number of tokens"):
        KvCache({"k": 8}).size_bytes(fp16, Setting())


def test_kv_cache_of_fused_grouped_and_repeated_projections():
    packed = replace(linear(64, 192, name="blocks.0.attn.in_proj"), op="attention_in_proj")
    assert find_kv_cache(graph(packed)).kept == {"blocks.0.attn.in_proj": 128}
    grouped = linear(4096, 4096 + 2 * 1024, name="h.0.attn.qkv_proj")  # 8 heads of 128 for keys, as many for values
    assert find_kv_cache(graph(grouped)).elements == 2048
    shared = replace(linear(64, 64, name="layer.attention.key"), calls=12)
    assert find_kv_cache(graph(shared)).elements == 12 * 64
    mamba = linear(64, 256, name="mixer.in_proj")
    with pytest.raises(GraphError, match="no projection to keys or values found"):
        find_kv_cache(graph(mamba, linear(64, 64)))
    with pytest.raises(GraphError, match="its 64 outputs are not more than its 64 inputs"):
        find_kv_cache(graph(linear(64, 64, name="attn.qkv")))
    with pytest.raises(BudgetError, match="'generic' has no figures for memory"):
        KvCache({"k": 8}).seconds(NumberFormat.parse("fp16"), find_device("generic"))
