import numpy as np
import pytest

from mpq.errors import MpqError
from mpq.problem import Constraint, PairCosts, Problem, Status
from mpq.search import Exhaustive, Ilp, Interaction, Knapsack
from mpq.search.feasibility import least_usage, smallest_relaxation


def size(limit=2.0, name="size"):
    return Constraint(name, "B", np.array([[1.0, 2.0], [1.0, 2.0]]), limit)


def test_a_limit_of_minus_infinity_is_refused():
    with pytest.raises(MpqError, match="'size': no pick meets a limit of -inf"):
        size(-np.inf)


def test_constraints_of_one_name_are_refused():
    loss = np.ones((2, 2))
    with pytest.raises(MpqError, match="different names; used twice: size"):
        Problem(loss, (size(), size(3.0)))
    with pytest.raises(MpqError, match="used twice: loss"):
        Problem(loss, (size(), size(name="loss"))).least("size", 1.0)
    assert least_usage(Problem(loss, (size(), size(3.0, "loss"))), "size").objective == 2.0


def test_solutions_can_be_compared():
    a, b = (Knapsack().solve(Problem(np.ones((2, 2)), (size(),))) for _ in range(2))
    assert a == a
    assert a != b


@pytest.mark.parametrize("solver", [Knapsack(), Ilp(), Exhaustive(), Interaction()])
@pytest.mark.parametrize("schemes", [0, 3])
def test_no_groups_use_nothing(solver, schemes):
    for limit, status in ((0.0, Status.OPTIMAL), (-1.0, Status.INFEASIBLE)):
        empty = Problem(np.zeros((0, schemes)), (Constraint("c", "", np.zeros((0, schemes)), limit),))
        found = solver.solve(empty)
        assert found.status is status
        assert (found.pick is None) == (status is Status.INFEASIBLE)


def test_largest_usage_counts_pairs():
    pairs = PairCosts([[0, 1]], [[[0.0, 2.0], [3.0, 0.0]]])
    made = Constraint("latency", "s", np.array([[1.0, 2.0], [1.0, 9.0]]), 4.0, pairs)
    loss = np.array([[0.0, 0.0], [0.0, np.inf]])
    assert Problem(loss, (made,)).largest_usage() == {"latency": 6.0}


def test_a_missing_unit_of_a_relaxation_is_named():
    with pytest.raises(MpqError, match="no unit of a relaxation for 'size'; there are: latency"):
        smallest_relaxation(Problem(np.ones((2, 2)), (size(),)), {"latency": 1.0})
