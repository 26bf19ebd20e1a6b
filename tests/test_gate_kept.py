"""Scores that look wrong: the sanity gate names them and keeps them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gates import NAMES, NORM, SCHEMES, UNROUTED, kinds, space_of, table_of
from torch import nn

from mpq.losses import CallableLoss
from mpq.sensitivity import measured_pairs, noise, perturbation, shapley
from mpq.sensitivity.capture import cut_below_zero
from mpq.sensitivity.gate import Finding, check
from mpq.testing import prepared, tiny_networks
from mpq.view import preserved_state


@pytest.mark.parametrize(
    ("stderr", "found"), [(0.0, True), (0.02, True), (0.03, False), (np.nan, False)], ids=["none", "3.5", "2.4", "nan"]
)
def test_more_bits_with_more_loss_are_named_beyond_noise(stderr, found):
    """The difference is 0.1; three joint standard errors are 3 * sqrt(2) * stderr."""
    space = space_of()
    table = table_of(space, ((0.3, 0.2, 0.1), (0.3, 0.2, 0.3), (0.1, 0.1, 0.1)), stderr=np.full((3, 3), stderr))
    gate = check(table, space)
    assert kinds(gate) == [("b", "not_monotone")] * found
    np.testing.assert_array_equal(gate.table.loss, table.loss)
    if found:
        assert str(gate.findings[0]) == "b: W8A8 (0.3) loses more than W4A8 (0.2) -> kept as measured"


def test_largest_of_several_inversions_is_named():
    space = space_of()
    gate = check(table_of(space, ((0.3, 0.2, 0.1), (0.1, 0.2, 0.4), (0.3, 0.2, 0.1))), space)
    assert [f.message for f in gate.findings] == ["W8A8 (0.4) loses more than W2A8 (0.1), and 2 more pairs"]


def test_rounding_is_no_inversion():
    space = space_of()
    assert check(table_of(space, (0.1, 0.1 * (1 + 5e-7), 0.05)), space).findings == ()
    assert check(table_of(space, (0.1, 0.1 * (1 + 5e-6), 0.05)), space).findings


@pytest.mark.parametrize(
    ("schemes", "found"),
    [
        ("W4A4,W4A8", True),
        ("W4A8,W8A8", True),
        ("W32A16,W32A32", True),
        ("W4A4,W8A8", False),  # both differ
        ("W4A8,W8A4", False),
        ("W4:tensorA8,W8A8", False),
        ("W4:g4A8,W8A8", False),
        ("W4:asymA8,W8A8", False),
        ("W8A8,W16A8", False),  # integers and floats
        ("W8A8,W8", False),
        ("W4A8:sym,W4A8", False),
    ],
)
def test_only_like_formats_are_compared(schemes, found):
    space = space_of(schemes.split(","))
    gate = check(table_of(space, (0.1, 0.2)), space)
    assert kinds(gate) == [(n, "not_monotone") for n in NAMES] * found


def test_zero_losses_are_named_and_kept():
    space = space_of()
    table = table_of(space, ((0.3, 0.2, 0.1), (0, 0, 0), (0.1, 0, 0)))
    gate = check(table, space)
    assert [str(f) for f in gate.findings] == ["b: all losses are zero -> free: gets the fewest bits"]
    assert kinds(gate) == [("b", "zero_gradient")]
    assert gate.space.allowed.all()


def test_losses_cut_at_zero_are_named_and_kept():
    space = space_of(pin={"c": "W8A8"})
    table = table_of(space, ((0.3, 0.2, 0.1), (0.1, 0, 0), (0.3, 0.2, 0.1)))
    cut = {"b": {"W4A8": -0.25, "W8A8": -0.001}, "c": {"W2A8": -1.0}, "not in the space": {"W2A8": -1.0}}
    gate = check(replace(table, provenance={"negative_losses": cut}), space)
    expected = "b: loses less than the float model at W4A8 (-0.25), W8A8 (-0.001) -> taken as zero"
    assert [str(f) for f in gate.findings] == [expected]
    assert kinds(gate) == [("b", "below_zero")]
    np.testing.assert_array_equal(gate.table.loss, table.loss)
    np.testing.assert_array_equal(gate.space.allowed, space.allowed)


def falling(output, batch):
    """A loss that some errors lower."""
    return output[:, 0].sin()


@pytest.mark.parametrize("estimator", [perturbation, measured_pairs, shapley, noise], ids=lambda f: f.__name__)
def test_measured_losses_below_zero_reach_the_gate(estimator):
    net, data = tiny_networks()["conv"]
    view, space, calib, bank = prepared(net, data, "W2,W3,W8")
    tables = []
    for sign in (1, -1):
        loss = CallableLoss(lambda output, batch, sign=sign: sign * falling(output, batch))
        with preserved_state(0):
            tables.append(estimator(view, space, calib, bank, loss, progress=False))
    for table, other in zip(tables, tables[::-1], strict=True):
        cut = {(g, s): v for g, row in table.provenance["negative_losses"].items() for s, v in row.items()}
        zero = [(table.groups[g], table.schemes[s]) for g, s in np.argwhere(table.loss == 0)]
        assert sorted(cut) == sorted(zero)
        for (g, s), value in cut.items():
            assert -value == pytest.approx(other.loss[table.groups.index(g), table.schemes.index(s)])
        gate = check(table, space)
        assert {f.group for f in gate.findings if f.kind == "below_zero"} == {g for g, _ in zero}
    assert sum(len(t.provenance["negative_losses"]) for t in tables) > 1


def test_rounding_is_no_loss_below_zero():
    space = space_of()
    losses, negative = cut_below_zero(space, np.array([[1.0, -1e-7, 0.5], [0.1, 0.2, 0.3], [-2e-6, 0.1, 0.1]]))
    assert negative == {"c": {"W2A8": -2e-6}}
    assert losses.min() == 0
    assert cut_below_zero(space, np.zeros((3, 3)))[1] == {}


def test_lossless_schemes_may_lose_nothing():
    space = space_of(["W32", "W32A32"])
    assert check(table_of(space, (0, 0)), space).findings == ()
    halves = space_of(["W16", "W32"], element_bits=16)
    assert check(table_of(halves, (0, 0)), halves).findings == ()
    for rounding in space_of(["W16", "W32"]), space_of(["Wint16", "W16"], element_bits=16):
        assert len(check(table_of(rounding, (0, 0)), rounding).findings) == 3
    pinned = space_of(pin={"a": "W8A8"})  # nothing to choose
    assert check(table_of(pinned, ((0, 0, 0), (0.3, 0.2, 0.1), (0.3, 0.2, 0.1))), pinned).findings == ()


def test_layers_that_never_ran_are_named():
    space = space_of(outside=[NORM, UNROUTED])
    gate = check(table_of(space), space)
    assert gate.findings == (Finding("expert", "never_ran", UNROUTED.reason, "stays float"),)


def test_never_ran_is_what_trace_says():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.expert, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x):
            x = self.norm(self.used(x))
            return self.expert(x) if x.sum() > 1e9 else x

    _, space, _, _ = prepared(Routed().double(), [torch.randn(3, 4, dtype=torch.float64)], ",".join(SCHEMES))
    found = check(table_of(space), space).findings
    assert [(f.group, f.kind) for f in found] == [("expert", "never_ran")]
