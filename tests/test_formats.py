import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq import NumberFormat, Scheme
from mpq.errors import FormatError
from mpq.quantizers import parse_schemes

integers = st.builds(
    NumberFormat,
    st.just("int"),
    st.integers(1, 16),
    st.one_of(st.sampled_from(["tensor", "channel"]), st.integers(1, 512).map(lambda g: f"group:{g}")),
    st.booleans(),
)
floats = st.sampled_from([NumberFormat.parse(n) for n in ("fp32", "fp16", "bf16")])
activations = st.builds(NumberFormat, st.just("int"), st.integers(1, 16), st.just("tensor"), st.booleans())


@given(st.one_of(integers, floats))
def test_format_names_parse_back(fmt):
    assert NumberFormat.parse(fmt.name) == fmt


@given(st.one_of(integers, floats), st.one_of(st.none(), activations, floats))
def test_scheme_names_parse_back(weight, activation):
    scheme = Scheme(weight, activation)
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("text", "weight", "activation"),
    [
        ("W4A8", "int4", "int8:tensor:asym"),
        ("W4", "int4", None),
        ("W4:g128A16", "int4:g128", "fp16"),
        ("W8:asymA8:sym", "int8:asym", "int8:tensor"),
        ("W3:tensorAbf16", "int3:tensor", "bf16"),
        ("W16A32", "fp16", "fp32"),
        ("Wint16Aint16", "int16", "int16:tensor:asym"),
        ("Wfp8_e4m3A8:token", "fp8_e4m3", "int8:token:asym"),
        ("W4Afp8_e4m3:token", "int4", "fp8_e4m3:token"),
        ("W4:g128:progressiveAnf4:g32", "int4:g128:progressive", "nf4:g32"),
        ("W4:b2x2A8:cross", "int4:b2x2", "int8:cross"),
    ],
)
def test_scheme_grammar(text, weight, activation):
    scheme = Scheme.parse(text)
    assert scheme.weight.name == weight
    assert (scheme.activation and scheme.activation.name) == activation


@pytest.mark.parametrize(
    "text", ["", "4", "W", "A8", "W0", "W17", "W4A", "w4a8", "W4:g0", "W4:blue", "W4A8:b2x2", "Wnf5"]
)
def test_bad_schemes_are_refused(text):
    with pytest.raises(FormatError):
        Scheme.parse(text)


def test_unknown_format_lists_the_known():
    with pytest.raises(FormatError, match=r"unknown number format 'nf5'.*int1 to int16"):
        NumberFormat.parse("nf5")


def test_parse_schemes_drops_duplicates_and_refuses_none():
    assert [str(s) for s in parse_schemes("W4A8, W8A8,W4A8")] == ["W4A8", "W8A8"]
    with pytest.raises(FormatError, match="no schemes"):
        parse_schemes("")


@pytest.mark.parametrize(
    ("name", "shape", "axis", "bits"),
    [
        ("int4", (8, 3, 3, 3), 0, 4 * 216 + 8 * 32),
        ("int4:asym", (8, 3, 3, 3), 0, 4 * 216 + 8 * (32 + 4)),
        ("int4:tensor", (8, 27), 0, 4 * 216 + 32),
        ("int4:g16", (8, 27), 0, 4 * 216 + 8 * 2 * 16),  # 27 = 16 + 11: two groups a channel
        ("int3:g16:asym", (8, 32), 0, 3 * 256 + 8 * 2 * (16 + 3)),
        ("int8", (6, 4, 2), 1, 8 * 48 + 4 * 32),  # transposed convolution: channels are the second axis
        ("fp16", (5, 5), 0, 16 * 25),
    ],
)
def test_storage_counts_scales_and_zero_points(name, shape, axis, bits):
    fmt = NumberFormat.parse(name)
    assert fmt.storage_bits(shape, axis) == bits
    assert fmt.bits_per_element(shape, axis) == bits / np.prod(shape)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kmeans", 12), "kmeans formats have 1 to 8 bits"),
        (("pow2", 12), "pow2 formats have 2 to 8 bits"),
        (("pow2", 1), "pow2 formats have 2 to 8 bits"),
        (("ternary", 7), "ternary formats have 2 bits"),
        (("binary", 2), "binary formats have 1 bits"),
        (("table", 5, "channel", True, 0, 0, "", "nf4"), "table formats have 4 bits"),
        (("mx", 4, "group:32", True, 3, 0, "e8m0"), "mx formats have no 4 bits with 3 of exponent"),
        (("nvfp", 4, "group:16", True, 1, 2, "e4m3"), "nvfp formats have no 4 bits with 1 of exponent"),
        (("int", 4, "channel", True, 2, 1), "only floats have exponent"),
        (("float", 17, "channel", True, 5, 11), "minifloats have 3 to 16 bits, of which 1 to 8 .*, unlike fp17_e5m11"),
        (("float", 16, "channel", True, 9, 6), "minifloats have 3 to 16 bits, of which 1 to 8 are exponent bits"),
        (("float", 8, "channel", True, 0, 7), "minifloats have 3 to 16 bits, of which 1 to 8 are exponent bits"),
        (("float", 8, "channel", True, 8, -1), "minifloats have 3 to 16 bits, of which 1 to 8 are exponent bits"),
        (("float", 10, "channel", True, 5, 5), "a float of 5 exponent and 5 mantissa bits has no 10 bits"),
    ],
)
def test_widths_are_checked_however_a_format_is_made(arguments, message):
    with pytest.raises(FormatError, match=message):
        NumberFormat(*arguments)


@pytest.mark.parametrize(
    "name",
    [
        *("int4:tensor:g32", "int4:g32:tensor", "int4:g32:g64", "int4:b2x2:channel", "fp8_e4m3:raw:tensor"),
        *("int4:sym:asym", "int4:asym:sym", "int4:g128:nested:progressive", "int4:p2:s32", "int4:s16:s32"),
    ],
)
def test_contradictions_are_refused(name):
    with pytest.raises(FormatError, match="of which a format has one"):
        NumberFormat.parse(name)
    with pytest.raises(FormatError, match="of which a format has one"):
        Scheme.parse(f"W{name}")


def test_one_format_has_one_name():
    assert NumberFormat.parse("int4:b1x32") == NumberFormat.parse("int4:g32")
    assert NumberFormat.parse("int4:b1x32").name == "int4:g32"
    assert NumberFormat.parse("int4:asym:g32:asym") == NumberFormat.parse("int4:g32:asym")
    with pytest.raises(FormatError, match="s16, s32"):
        NumberFormat.parse("int4:blue")
    for name, plain in (("fp16_e5m10", "fp16"), ("fp16_e8m7", "bf16"), ("fp32_e8m23", "fp32")):
        with pytest.raises(FormatError, match=f"{name} is {plain}, a cast without scales"):
            NumberFormat.parse(f"{name}:tensor")


@pytest.mark.parametrize("option", ["", ":raw", ":tensor", ":g8", ":g8:p2"])
def test_nothing_is_gained_by_scaling_floats_of_float32s_range(option):
    fmt = NumberFormat.parse(f"fp12_e8m3{option}")
    assert (fmt.name, fmt.storage_bits((4, 10))) == ("fp12_e8m3", 480)


def test_tensors_without_elements_have_no_bits_for_each():
    with pytest.raises(FormatError, match=r"\[0, 4\] without elements"):
        NumberFormat.parse("int4").bits_per_element((0, 4))


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("int4:lorc1:qera2", "int4:lorc3"),
        ("int4:qera2:hadamard:lorc1:gptq", "int4:lorc3:hadamard"),
        ("int4:qera2:gptq", "int4:lorc2"),
        ("int4:lorc4", "int4:lorc4"),
    ],
)
def test_recipes_without_data(name, without):
    assert NumberFormat.parse(name).data_free.name == without
