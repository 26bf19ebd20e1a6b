import itertools
import json
import re
import warnings
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpq.analysis import Analysis
from mpq.cost_models import default_costs, find_device
from mpq.errors import MpqError, UnreachableError
from mpq.layers import LayerGraph, LayerSpec, Outside
from mpq.losses import CallableLoss, KLLoss
from mpq.problem import Constraint, Problem, Status
from mpq.search import Knapsack
from mpq.sensitivity import SensitivityTable, influence, measured_pairs, noise, perturbation, shapley
from mpq.sensitivity.capture import cut_below_zero
from mpq.sensitivity.gate import Finding, check
from mpq.space import make_space
from mpq.testing import prepared, tiny_networks
from mpq.view import preserved_state

NAMES = ("a", "b", "c")
SCHEMES = ("W2A8", "W4A8", "W8A8")
UNROUTED = Outside("expert", 9, 36, 0, "not called as a module on the first calibration batch")
NORM = Outside("norm", 9, 36, 0, "LayerNorm is not quantizable")


def space_of(schemes=SCHEMES, outside=(), names=NAMES, element_bits=32, **options):
    shapes = (4, 8), (4, 8), (8,), (4,)
    layers = [LayerSpec(n, "linear", *shapes, 32, 32, 1, i, i, element_bits) for i, n in enumerate(names)]
    graph = LayerGraph(tuple(layers), tuple(outside), nx.DiGraph(), "fx", 96)
    return make_space(graph, schemes, device=find_device("generic"), **options)


def table_of(space, loss=(0.3, 0.2, 0.1), **fields):
    """The same losses in each group, unless given for each."""
    shape = space.allowed.shape
    names = tuple(g.name for g in space.groups), tuple(map(str, space.schemes))
    given = {"stderr": np.zeros(shape)} | fields
    return SensitivityTable(*names, np.broadcast_to(np.array(loss, float), shape).copy(), **given)


def with_entry(array, index, value):
    array[index] = value
    return array


def kinds(gate):
    return [(f.group, f.kind) for f in gate.findings]


def assert_quarantined(gate, g, s):
    """Group ``g`` keeps scheme ``s`` alone and has no scores left; all other groups keep their choice."""
    others = np.arange(len(gate.table.groups)) != g
    np.testing.assert_array_equal(np.flatnonzero(gate.space.allowed[g]), [s])
    assert gate.space.allowed[others].all()
    assert not gate.table.loss[g].any()
    assert not gate.table.stderr[g].any()
    assert gate.table.loss[others].all()
    assert gate.quarantined == (gate.table.groups[g],)


def test_sound_table_is_left_alone():
    space = space_of(outside=[NORM])
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(3, 3, 3, 3))
    pairs += pairs.transpose(2, 3, 0, 1)
    # A single sample has no standard error.
    table = table_of(space, stderr=np.full((3, 3), np.nan), rows=rng.normal(size=(1, 2, 3, 3)), interactions=pairs)
    gate = check(table, space)
    assert gate.findings == gate.quarantined == ()
    for k in ("loss", "stderr", "rows", "interactions"):
        np.testing.assert_array_equal(getattr(gate.table, k), getattr(table, k))
    np.testing.assert_array_equal(gate.space.allowed, space.allowed)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (np.nan, "not_finite", "NaN at W2A8"),
        (np.inf, "not_finite", "infinite at W2A8"),
        (-np.inf, "not_finite", "infinite at W2A8"),
        (-1e-3, "negative", "negative at W2A8"),
    ],
)
def test_unusable_loss_is_quarantined(value, kind, message):
    space = space_of()
    table = table_of(space)
    table.loss[1, 0] = value
    gate = check(table, space)
    assert gate.findings == (Finding("b", kind, message, "kept at W8A8"),)
    assert str(gate.findings[0]) == f"b: {message} -> kept at W8A8"
    assert_quarantined(gate, 1, 2)
    assert space.allowed.all()  # inputs stay as they were


def test_infinite_standard_errors_and_effects_are_quarantined():
    space = space_of()
    rows = np.ones((4, 2, 3, 3))
    rows[3, 1, 2, 1] = np.nan
    gate = check(table_of(space, stderr=with_entry(np.full((3, 3), np.nan), (0, 2), np.inf), rows=rows), space)
    assert [str(f) for f in gate.findings] == [
        "a: infinite standard error at W8A8 -> kept at W8A8",
        "c: NaN or infinite effects of samples at W4A8 -> kept at W8A8",
    ]
    assert np.isnan(gate.table.stderr[1]).all()
    np.testing.assert_array_equal(gate.table.rows.any((0, 1)), [[False] * 3, [True] * 3, [False] * 3])


def test_interactions_of_a_quarantined_group_are_zero_on_both_sides():
    space = space_of()
    pairs = np.ones((3, 3, 3, 3))
    pairs[np.arange(3), :, np.arange(3)] = 0
    table = table_of(space, interactions=pairs)
    table.loss[0, 1] = np.nan
    pairs[0, 0, 1, 0] = pairs[1, 0, 0, 0] = np.nan  # the sick group's own; its partner is well
    gate = check(table, space)
    assert_quarantined(gate, 0, 2)
    found = gate.table.interactions
    assert not found[0].any()
    assert not found[:, :, 0].any()
    assert (found[1, :, 2] == 1).all()
    assert (found[2, :, 1] == 1).all()


def test_broken_interactions_take_out_the_group_with_most_of_them():
    space = space_of()
    pairs = np.zeros((3, 3, 3, 3))
    pairs[0, 0, 2, 0] = np.nan  # on one side only
    pairs[2, 1, 1, 1] = np.inf
    gate = check(table_of(space, interactions=pairs), space)
    assert [str(f) for f in gate.findings] == ["c: NaN or infinite interactions with a and 1 more -> kept at W8A8"]
    assert_quarantined(gate, 2, 2)
    assert np.isfinite(gate.table.interactions).all()


@pytest.mark.parametrize("loss", [np.nan, -0.1], ids=["nan", "negative"])
def test_group_that_is_out_in_any_case_answers_for_its_interactions(loss):
    space = space_of()
    pairs = np.zeros((3, 3, 3, 3))
    pairs[0, 0, 1, 0] = pairs[1, 0, 0, 0] = np.nan
    table = table_of(space, interactions=pairs)
    table.loss[1, 1] = loss
    gate = check(table, space)
    assert_quarantined(gate, 1, 2)
    assert np.isfinite(gate.table.interactions).all()


@pytest.mark.parametrize("key", ["negative_traces", "negative_eigenvalues"])
def test_clipped_traces_are_quarantined(key):
    """By the name of any layer of the group."""
    space = space_of(groups=[["b", "c"]])
    table = table_of(space, ((0.3, 0.2, 0.1), (0, 0, 0)), provenance={key: ["c", "not in the space"]})
    gate = check(table, space)
    assert kinds(gate) == [("b", "negative_trace")]  # and not free for its zeros
    assert gate.findings[0].message.endswith("of c")
    assert_quarantined(gate, 1, 2)


@pytest.mark.parametrize(
    ("schemes", "widest"),
    [
        ("W8A8,W2A8,W4A8", "W8A8"),
        ("W8A4,W8A8,W4A8", "W8A8"),
        ("W8A8,W8,W4", "W8"),
        ("W8,W8:g2,W8:tensor", "W8:g2"),
        ("W4A16,W8A8", "W8A8"),
    ],
)
def test_quarantine_keeps_the_widest_scheme(schemes, widest):
    space = space_of(schemes.split(","))
    table = table_of(space, (np.nan,) * len(space.schemes))
    gate = check(table, space)
    assert {f.action for f in gate.findings} == {f"kept at {widest}"}
    assert [str(gate.space.schemes[s]) for s in gate.space.allowed.argmax(1)] == [widest] * 3
    assert (gate.space.allowed.sum(1) == 1).all()


def test_only_allowed_schemes_are_judged():
    """A pinned group keeps its scheme; what was not measured elsewhere is no finding, and finite afterwards."""
    space = space_of(pin={"a": "W4A8", "b": "W4A8"})
    pairs = np.ones((3, 3, 3, 3))
    pairs[0, 0, 2, 0] = np.nan  # on one side only
    loss = [[0.1, 0.2, np.nan], [0.3, np.nan, 0.1], [0.3, 0.2, 0.1]]
    gate = check(table_of(space, loss, stderr=with_entry(np.zeros((3, 3)), (0, 2), np.inf), interactions=pairs), space)
    assert [str(f) for f in gate.findings] == ["b: NaN at W4A8 -> kept at W4A8"]
    np.testing.assert_array_equal(gate.space.allowed, space.allowed)
    np.testing.assert_array_equal(gate.table.loss, [[0.1, 0.2, 0], [0, 0, 0], [0.3, 0.2, 0.1]])
    assert np.isfinite(gate.table.stderr).all()
    np.testing.assert_array_equal(gate.table.interactions, gate.table.interactions.transpose(2, 3, 0, 1))


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
    """The reason is known by how `mpq.trace` words it."""

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


def test_summary_warning_and_provenance():
    experts = [replace(UNROUTED, name=f"expert{i}") for i in range(8)]
    space = space_of(outside=experts)
    table = table_of(space)
    table.loss[:2, 0] = np.nan, -1
    table.loss[0, 1] = -1
    gate = check(table, space)
    lines = repr(gate).splitlines()
    assert lines[0] == "Gate: 11 findings, 2 groups quarantined"
    assert lines[1:3] == ["  a: NaN at W2A8 -> kept at W8A8", "  a: negative at W4A8 -> kept at W8A8"]
    assert lines[4].startswith("  expert0: ")
    assert lines[9:] == ["  and 3 more: never_ran"]
    with pytest.warns(UserWarning, match=r"2 of 3 groups .* a: NaN at W2A8 -> kept at W8A8; a: negative") as caught:
        gate.warn()
    assert len(caught) == 2
    assert re.match(r"looks wrong, but is kept: expert0: .*; and 3 more$", str(caught[1].message))
    record = json.loads(json.dumps(gate.provenance(), allow_nan=False))
    assert [Finding(**f) for f in record] == list(gate.findings)


def test_long_warnings_are_cut_and_sound_tables_give_none():
    space = space_of(names=[f"n{i}" for i in range(8)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(table_of(space), space).warn()
    with pytest.warns(UserWarning, match=r"is kept: n0: W8A8 .*; n4: .*; and 3 more$"):
        check(table_of(space, (0.1, 0.2, 0.3)), space).warn()
    with pytest.warns(UserWarning, match=r"8 of 8 .* n4: .*; and 3 more\. Skip") as caught:
        check(table_of(space, (np.nan, 0.2, 0.1)), space).warn()
    assert "n5" not in str(caught[0].message)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("groups", ("a", "c", "b")),
        ("schemes", SCHEMES[::-1]),
        ("loss", np.ones((3, 2))),
        ("stderr", np.ones((3, 1))),
        ("interactions", np.ones((3, 3, 3, 2))),
        ("rows", np.ones((2, 3, 3))),
    ],
)
def test_table_of_another_space_is_refused(field, wrong):
    space = space_of()
    with pytest.raises(MpqError, match=r"search space|don't fit"):
        check(replace(table_of(space), **{field: wrong}), space)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6))
def test_gated_tables_always_solve(seed):
    """Whatever the estimator returns: valid arrays, an optimum, and every limit that the space can meet is met."""
    rng = np.random.default_rng(seed)
    space = space_of(pin={"a": "W4A8"} if seed % 3 == 0 else None)

    def broken(*shape):
        values = rng.random(shape)
        return np.where(rng.random(shape) < rng.choice([0, 0.05, 0.5]), rng.choice([np.nan, np.inf, -1e9, 0]), values)

    pairs = broken(3, 3, 3, 3)
    pairs = pairs + pairs.transpose(2, 3, 0, 1)
    pairs[np.arange(3), :, np.arange(3)] = 0
    table = table_of(space, broken(3, 3), stderr=broken(3, 3), interactions=pairs, rows=broken(2, 1, 3, 3))
    gate = check(table, space)
    assert (gate.space.allowed <= space.allowed).all()
    loss = np.where(gate.space.allowed, gate.table.loss, np.inf)
    assert (loss >= 0).all()
    size = rng.random((3, 3))
    least = Problem(loss, (Constraint("size", "", size, 0),)).smallest_usage()["size"]
    Problem(loss, (), gate.table.interactions)  # accepted
    for limit in (least, least + rng.random(), np.array([9.0])):
        problem = Problem(loss, (Constraint("size", "", size, limit),))
        solution = Knapsack().solve(problem)
        assert solution.status is Status.OPTIMAL
        assert problem.feasible(solution.pick)
        for g in gate.quarantined:
            row = NAMES.index(g)  # schemes go from few to many bits
            assert solution.pick[row] == np.flatnonzero(space.allowed[row])[-1]
    assert check(gate.table, gate.space).quarantined == ()


def sick(view, space, data, bank, loss, *, group, **options):
    """Influence with one group's scores lost."""
    table = influence(view, space, data, bank, loss, **options)
    g = table.groups.index(group)
    table.loss[g, 0] = table.rows[0, 0, g, 0] = table.interactions[g, 0] = np.nan
    return table


def test_one_broken_group_does_not_stop_the_search():
    net, data = tiny_networks()["conv"]
    view, space, calib, bank = prepared(net, data, ",".join(SCHEMES))
    g, name = 1, space.groups[1].name
    with preserved_state(0):
        table = sick(view, space, calib, bank, KLLoss(), group=name, progress=False)
    gate = check(table, space)
    assert gate.quarantined == (name,)
    assert_quarantined(gate, g, 2)
    costs = default_costs(gate.space)
    analysis = Analysis(gate.space, gate.table, costs, {}, {"estimator": "sick"})
    config = analysis.allocate("avg_bits<=5")
    assert str(config[name].scheme) == "W8A8"
    assert config.avg_bits <= 5
    assert np.isfinite(gate.table.stderr_of([0, 2, 0]))
    # The most accurate of the configs that keep the group wide, by trying all.
    size = costs["avg_bits"]
    picks = [p for p in itertools.product(range(3), repeat=3) if p[g] == 2 and size.total(p) <= 5]
    assert config.predicted["loss"] == pytest.approx(min(gate.table.total(p)[0] for p in picks))
    with pytest.raises(UnreachableError):
        analysis.allocate("avg_bits<=2")
