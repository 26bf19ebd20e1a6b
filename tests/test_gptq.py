"""GPTQ against a plain loop: the textbook formulation that solves the remaining columns anew after each one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq import NumberFormat
from mpq.errors import DataError, FormatError
from mpq.quantizers import fake_quantize
from mpq.quantizers.elements import element_scales
from mpq.quantizers.gptq import gptq
from mpq.quantizers.statistics import LayerStats
from mpq.quantizers.tensors import round_elements

FORMATS = [
    "int4",
    "int4:asym",
    "int4:g8",
    "int3:b2x4",
    "nf4",
    "fp4_e2m1:raw",
    "mxfp4",
    "nvfp4",
    "pow2_4",
    "ternary",
    "int4:p2",
]


def problem(seed, groups=1, out=6, width=24, rows=200):
    """A weight and statistics of correlated inputs of very different sizes, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, rows, width, generator=generator, dtype=torch.float64) @ mix
    x = x * torch.logspace(-1, 1, width, dtype=torch.float64)[torch.randperm(width, generator=generator)]
    weight = torch.randn(groups * out, width, generator=generator, dtype=torch.float64)
    return weight, LayerStats(x.transpose(1, 2) @ x / rows, x.abs().mean(1), x.abs().amax(1), rows)


def reference(weight, fmt, stats, order):
    """Round one column, then let the least-squares solution of the others make up for it; ``[out, in]``, one group."""
    scale, zero = element_scales(weight, fmt)
    hessian = stats.damped()[0]
    w, left = weight.clone(), list(order)
    while left:
        j, left = left[0], left[1:]
        q = round_elements(w[:, j], scale[:, j], None if zero is None else zero[:, j], fmt)
        error, w[:, j] = w[:, j] - q, q
        if left:
            # Minimises the outputs' error over what is left, given the error made in column j.
            w[:, left] += error[:, None] * torch.linalg.solve(hessian[left][:, left], hessian[left, j])
    return w


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("by_activation", [True, False])
def test_equals_a_plain_loop(name, by_activation):
    fmt = NumberFormat.parse(name)
    weight, stats = problem(3)
    order = range(weight.shape[1])
    if by_activation:
        order = stats.hessian[0].diagonal().argsort(descending=True).tolist()
    expected = reference(weight, fmt, stats, order)
    found = gptq(weight, fmt, stats, by_activation=by_activation)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.equal(found, fake_quantize(weight, fmt))


def test_groups_are_rounded_as_if_alone():
    weight, stats = problem(4, groups=3, width=9)
    fmt = NumberFormat.parse("int3")
    for g, rows in enumerate(weight.chunk(3)):
        alone = LayerStats(stats.hessian[g, None], stats.mean_abs[g, None], stats.largest[g, None], stats.rows)
        torch.testing.assert_close(gptq(weight, fmt, stats).chunk(3)[g], gptq(rows, fmt, alone))


def test_more_columns_than_are_updated_at_once():
    weight, stats = problem(5, out=3, width=150, rows=600)
    fmt = NumberFormat.parse("int4:g32")
    expected = reference(weight, fmt, stats, range(150))
    torch.testing.assert_close(gptq(weight, fmt, stats, by_activation=False), expected, rtol=1e-8, atol=1e-8)


def test_the_order_of_columns_leaves_no_trace():
    """Columns and inputs permuted alike give the permuted weight, where scales don't depend on places."""
    weight, stats = problem(6)
    fmt = NumberFormat.parse("int4")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gptq(weight[:, order], fmt, stats.taken(order)), gptq(weight, fmt, stats)[:, order])
    scale, _ = element_scales(weight, NumberFormat.parse("int4:g8"))
    codes = gptq(weight, NumberFormat.parse("int4:g8"), stats) / scale  # groups stay those of neighbouring columns
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["int3", "int4", "int4:g8", "nf4", "mxfp4", "fp4_e2m1"]))
def test_beats_nearest_rounding_by_far(seed, name):
    weight, stats = problem(seed, out=16)
    fmt = NumberFormat.parse(name)
    nearest, found = (
        float(stats.output_error(q - weight).sum()) for q in (fake_quantize(weight, fmt), gptq(weight, fmt, stats))
    )
    assert found < 0.8 * nearest


def test_inputs_that_do_not_correlate_leave_nearest_rounding():
    weight, _ = problem(7)
    stats = LayerStats(torch.eye(24)[None], torch.ones(1, 24), torch.ones(1, 24), 10**6)
    for name in ("int4", "nf4"):
        torch.testing.assert_close(
            gptq(weight, NumberFormat.parse(name), stats), fake_quantize(weight, NumberFormat.parse(name))
        )
    dead = LayerStats(torch.zeros(1, 24, 24), torch.zeros(1, 24), torch.zeros(1, 24), 10)
    torch.testing.assert_close(
        gptq(weight, NumberFormat.parse("int4"), dead), fake_quantize(weight, NumberFormat.parse("int4"))
    )


def test_formats_without_a_grid_are_refused():
    weight, stats = problem(8)
    for name in ("kmeans_4", "fp16"):
        with pytest.raises(FormatError):
            gptq(weight, NumberFormat.parse(name), stats)


def test_second_moments_that_are_none_are_refused():
    weight, stats = problem(0)
    with pytest.raises(DataError, match="not positive definite"):
        gptq(weight, NumberFormat.parse("int4"), replace(stats, hessian=-stats.hessian))
