import itertools
import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
from gates import NAMES, NORM, SCHEMES, UNROUTED, kinds, space_of, table_of
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.analysis import Analysis
from mpq.cost_models import default_costs
from mpq.errors import MpqError, UnreachableError
from mpq.losses import KLLoss
from mpq.problem import Constraint, Problem, Status
from mpq.search import Knapsack
from mpq.sensitivity import influence
from mpq.sensitivity.gate import Finding, check
from mpq.testing import prepared, tiny_networks
from mpq.view import preserved_state


def with_entry(array, index, value):
    array[index] = value
    return array


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
