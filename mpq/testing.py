"""Contract tests for extensions: subclass a case, supply one fixture, inherit all checks.

Example::

    class TestMySolver(SolverContract):
        @pytest.fixture
        def solver(self):
            return MySolver()
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpq.allocation import analyze
from mpq.bank import QuantizerBank
from mpq.calibration import Calibration
from mpq.cost_models import COST_MODELS, CostModel, find_device
from mpq.losses import OutputLoss
from mpq.problem import Constraint, Floats, Ints, Problem, Status
from mpq.search import Exhaustive, Solver
from mpq.space import SearchSpace, make_space
from mpq.trace import trace, trace_model
from mpq.view import ModelView

KINDS = ("ties", "huge", "zeros", "signed", "plain")


def random_problem(rng: np.random.Generator, *, rows: int = 1, constraints: int = 1, ties: bool = False) -> Problem:
    """A small problem, often infeasible or with forbidden schemes.

    Args:
        rng: Where the numbers come from.
        rows: Rows of each constraint.
        constraints: How many constraints.
        ties: Whole numbers, so that many picks are equal.
    """
    G, S = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    loss = rng.integers(0, 4, (G, S)).astype(float) if ties else rng.random((G, S))
    if rng.random() < 0.3:
        forbidden = rng.random((G, S)) < 0.4
        forbidden[np.arange(G), rng.integers(0, S, G)] = False
        loss = np.where(forbidden, np.inf, loss)
    made = []
    for i in range(constraints):
        cost = rng.integers(0, 6, (G, S, rows)).astype(float) if ties else rng.random((G, S, rows))
        low, high = cost.min(1).sum(0), cost.max(1).sum(0)
        limit = low + rng.uniform(-0.15, 0.9, rows) * (high - low)
        made.append(Constraint(f"c{i}", "", cost, np.round(limit) if ties else limit))
    return Problem(loss, tuple(made))


def separable_network(groups: int, schemes: int = 6, rows: int = 1, seed: int = 0, share: float = 0.4) -> Problem:
    """A problem like that of a network, of any size: losses fall fourfold per bit.

    Args:
        groups: How many.
        schemes: Of 2, 3, 4, 5, 6 and 8 bits.
        rows: Limits: of size, then of latency, in which odd bits are slow, then of BitOps.
        seed: Of everything random.
        share: Limits, between the least and the most that can be used.
    """
    rng = np.random.default_rng(seed)
    bits = np.array([2.0, 3, 4, 5, 6, 8])[:schemes]
    loss = rng.lognormal(0, 2, (groups, 1)) * 4.0**-bits * rng.uniform(0.7, 1.3, (groups, schemes))
    count = np.round(rng.lognormal(8, 1, (groups, 1)))
    steps = np.array([1.0, 1.8, 1.2, 2.4, 2.6, 2.0])[:schemes]
    costs = [
        count * bits,
        count**0.7 * rng.lognormal(0, 0.5, (groups, 1)) * steps,
        count * rng.lognormal(3, 1, (groups, 1)) * bits**2,
    ]
    constraints = []
    for name, cost in zip(("size", "latency", "bitops"), costs[:rows], strict=False):
        low, high = cost.min(1).sum(), cost.max(1).sum()
        constraints.append(Constraint(name, "", cost, np.array([low + share * (high - low)])))
    return Problem(loss, tuple(constraints))


def interacting_network(groups: int, schemes: int = 5, seed: int = 0, share: float = 0.4, rank: int = 4) -> Problem:
    """A problem like that of a network whose errors fall with the bits and correlate between layers.

    Args:
        groups: How many.
        schemes: Of 2, 3, 4, 6, 8 and 10 bits.
        seed: Of everything random.
        share: The limit of the size, between the least and the most.
        rank: Of the interactions, in groups: they correlate more at low rank.
    """
    rng = np.random.default_rng(seed)
    bits = np.array([2.0, 3, 4, 6, 8, 10])[:schemes]
    factor = rng.standard_normal((rank * groups, groups, schemes)) * 2.0**-bits * rng.lognormal(0, 0.7, (groups, 1))
    pairs = np.tensordot(factor, factor, (0, 0))
    loss = np.einsum("gsgs->gs", pairs).copy() / 2
    pairs[np.arange(groups), :, np.arange(groups)] = 0.0
    cost = np.round(rng.lognormal(5, 1, (groups, 1))) * bits
    limit = cost[:, 0].sum() + share * (cost[:, -1] - cost[:, 0]).sum()
    return Problem(loss, (Constraint("size", "bits", cost, np.array([limit])),), pairs)


def random_numbers(rng: np.random.Generator, kind: str, shape: Sequence[int]) -> Floats:
    """Numbers that solvers stumble over, of a kind in `KINDS`.

    Args:
        rng: Where they come from.
        kind: ``ties``: small whole numbers; ``huge``: 24 orders of magnitude; ``zeros``: the same, half of them zero;
            ``signed``: of either sign; ``plain``: between 0 and 1.
        shape: Of the array.
    """
    if kind == "ties":
        return rng.integers(0, 4, shape).astype(float)
    if kind == "signed":
        return rng.standard_normal(shape)
    if kind == "plain":
        return rng.random(shape)
    found: Floats = 10.0 ** rng.uniform(-12, 12, shape)
    return np.where(rng.random(shape) < 0.5, 0.0, found) if kind == "zeros" else found


def feasible_picks(problem: Problem) -> tuple[Ints, Floats]:
    """All feasible picks ``[n, G]`` and their objectives ``[n]``, tried one by one."""
    G, S = problem.loss.shape
    picks = [p for p in itertools.product(range(S), repeat=G) if problem.feasible(p)]
    return np.array(picks, np.int64).reshape(-1, G), np.array([problem.objective(p) for p in picks])


class SolverContract:
    """What holds for every exact solver of problems with one constraint; the fixture is ``solver``."""

    rows, constraints = 1, 1

    def problems(self, count: int = 40) -> list[Problem]:
        """Reproducible problems with and without ties."""
        rng = np.random.default_rng(0)
        size = {"rows": self.rows, "constraints": self.constraints}
        return [random_problem(rng, ties=i % 2 == 0, **size) for i in range(count)]

    def least(self, problem: Problem) -> float:
        """The true least objective; infinite if no pick is feasible."""
        return Exhaustive().solve(problem).objective

    def test_agrees_with_exhaustive_search(self, solver: Solver) -> None:
        """Same status and objective; the pick is feasible and what is reported is what it costs."""
        for problem in self.problems():
            least, found = self.least(problem), solver.solve(problem)
            assert found.status is (Status.INFEASIBLE if np.isinf(least) else Status.OPTIMAL)
            if found.pick is None:
                continue
            assert problem.feasible(found.pick)
            np.testing.assert_allclose(found.objective, least, rtol=1e-9, atol=1e-12)
            assert found.objective == problem.objective(found.pick)
            for name, used in problem.usage(found.pick).items():
                np.testing.assert_array_equal(found.usage[name], used)
            assert found.bound <= found.objective

    def test_same_problem_same_pick(self, solver: Solver) -> None:
        """Solving twice gives the same pick."""
        for problem in self.problems(10):
            np.testing.assert_array_equal(solver.solve(problem).pick, solver.solve(problem).pick)

    def test_tighter_limit_never_lowers_the_optimum(self, solver: Solver) -> None:
        """Losses rise as limits fall."""
        for problem in self.problems(10):
            best = -np.inf
            for share in (1.0, 0.8, 0.6):
                tighter = tuple(Constraint(c.name, c.unit, c.cost, c.limit * share) for c in problem.constraints)
                objective = solver.solve(Problem(problem.loss, tighter)).objective
                assert objective >= best - 1e-9
                best = objective

    def test_permuted_groups_permute_the_answer(self, solver: Solver) -> None:
        """The order of groups does not matter."""
        for problem in self.problems(10):
            order = np.random.default_rng(1).permutation(len(problem.loss))
            permuted = tuple(Constraint(c.name, c.unit, c.cost[order], c.limit) for c in problem.constraints)
            a, b = solver.solve(problem), solver.solve(Problem(problem.loss[order], permuted))
            assert a.status is b.status
            if a.pick is not None:
                np.testing.assert_allclose(a.objective, b.objective, rtol=1e-9, atol=1e-12)

    def test_single_choice(self, solver: Solver) -> None:
        """One scheme each: nothing to choose, still solved and proven."""
        solution = solver.solve(Problem(np.ones((3, 1)), (Constraint("size", "B", np.ones((3, 1)), np.array([3.0])),)))
        assert solution.status is Status.OPTIMAL
        assert solution.objective == 3.0


def tiny_network(seed: int = 0) -> tuple[nn.Module, list[torch.Tensor]]:
    """Four layers in float64 and two calibration batches."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.ReLU(),
        nn.Conv2d(3, 2, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    ).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.5)
    data = [torch.randn(4, 1, 6, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    return net.eval(), data


class _Tokens(nn.Module):
    """Embedding, attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        found: torch.Tensor = self.head(x.mean(1))
        return found


class _Shared(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.again(torch.tanh(self.first(x))))
        found: torch.Tensor = self.last(torch.tanh(self.again(x)))
        return found


def tiny_networks() -> dict[str, tuple[nn.Module, list[torch.Tensor]]]:
    """Smooth float64 networks of a few dozen weights, each with two calibration batches of different sizes.

    Between them they hold every kind of layer: convolutions, depthwise ones, linear layers, attention, embeddings and
    a module that is called twice. All give logits of three classes, and all have second derivatives.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def ids() -> torch.Tensor:
        return torch.randint(0, 6, (3, 4), generator=generator)

    depthwise = [nn.Conv2d(2, 2, 3, groups=2), nn.Tanh(), nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Flatten()]
    conv = [nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 2, 2), nn.Flatten(), nn.Tanh()]
    networks: dict[str, tuple[nn.Module, list[torch.Tensor]]] = {
        "conv": (nn.Sequential(*conv, nn.Linear(6, 3)), [randn(3, 2, 5), randn(5, 2, 5)]),
        "depthwise": (nn.Sequential(*depthwise, nn.Linear(12, 3)), [randn(3, 2, 4, 4), randn(5, 2, 4, 4)]),
        "linear": (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), [randn(3, 4), randn(5, 4)]),
        "attention": (_Tokens(), [ids(), torch.cat([ids(), ids()])]),
        "shared": (_Shared(), [randn(3, 4), randn(5, 4)]),
    }
    for net, _ in networks.values():
        net.double().eval()
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.6)
    return networks


def dense_hessian(view: ModelView, data: Calibration, loss: OutputLoss, names: Sequence[str]) -> torch.Tensor:
    """Hessian of the mean loss over all samples in the named weights together, ``[n, n]``: the slow, obvious twin.

    Rows and columns follow ``names``, each weight flattened.
    """
    weights = [view.weight(name).detach() for name in names]
    sizes = [w.numel() for w in weights]
    with torch.no_grad():
        references = [view(b) for b in data.batches]

    def mean_loss(flat: torch.Tensor) -> torch.Tensor:
        parts = [v.view_as(w) for v, w in zip(torch.split(flat, sizes), weights, strict=True)]
        with view.swapped(dict(zip(names, parts, strict=True))), sdpa_kernel(SDPBackend.MATH):
            losses = [loss.value(view(b), r, b).sum() for b, r in zip(data.batches, references, strict=True)]
        return torch.stack(losses).sum() / data.num_samples

    flat = torch.cat([w.flatten() for w in weights])
    found: torch.Tensor = torch.func.hessian(mean_loss)(flat)
    return found


def prepared(
    net: nn.Module, data: list[torch.Tensor], schemes: str
) -> tuple[ModelView, SearchSpace, Calibration, QuantizerBank]:
    """What every estimator takes: view, space, calibration data and quantizer bank."""
    view = ModelView(net)
    calib = Calibration.load(data, view.read)
    graph = trace(view, calib.batches[0])
    space = make_space(graph, schemes, device=find_device("generic"))
    bank = QuantizerBank(view, graph, data=calib, progress=False)
    bank.observe(calib, progress=False)
    return view, space, calib, bank


class EstimatorContract:
    """What holds for every estimator; the fixture is ``estimator``: a name or a function."""

    schemes = "W2A8,W4A8,W8A8"

    def analysis(self, estimator: Any, **options: Any) -> Any:
        """Analysis of the tiny network."""
        net, data = tiny_network()
        return analyze(net, data, self.schemes, estimator=estimator, progress=False, **options)

    def test_shapes_and_finite(self, estimator: Any) -> None:
        """One finite loss and one standard error for each choice; the cost is stated."""
        table = self.analysis(estimator).table
        assert table.loss.shape == table.stderr.shape == (4, 3)
        assert np.isfinite(table.loss).all()
        assert (table.stderr >= 0).all()
        assert table.provenance["forward_passes"] > 0

    def test_seed_reproduces(self, estimator: Any) -> None:
        """The same seed gives the same bytes."""
        a, b = self.analysis(estimator, seed=3).table, self.analysis(estimator, seed=3).table
        np.testing.assert_array_equal(a.loss, b.loss)
        np.testing.assert_array_equal(a.stderr, b.stderr)

    def test_more_bits_cost_less(self, estimator: Any) -> None:
        """Two bits hurt more than eight, in total."""
        loss = self.analysis(estimator).table.loss.sum(0)
        assert loss[0] > loss[2] >= 0

    def test_model_is_left_alone(self, estimator: Any) -> None:
        """Weights, gradients, hooks, mode and random state are as before."""
        net, data = tiny_network()
        net.train()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        state = torch.get_rng_state()
        analyze(net, data, self.schemes, estimator=estimator, progress=False)
        assert net.training
        assert torch.equal(torch.get_rng_state(), state)
        for name, value in net.state_dict().items():
            assert torch.equal(value, before[name])
        for module in net.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        assert all(p.grad is None and p.requires_grad for p in net.parameters())


class CostContract:
    """What holds for every cost model; the fixture is ``cost_model``: a function or its name.

    Attributes:
        device: Where it is tried; it must run the four schemes.
        schemes: By rising weight bits, the last one of floats.
    """

    device = "generic"
    schemes = "W2A8,W4A8,W8A8,W32"

    def space(self) -> SearchSpace:
        """Search space of the tiny network."""
        net, data = tiny_network()
        return make_space(trace_model(net, data[0]), self.schemes, device=find_device(self.device))

    def test_shape_and_finite(self, cost_model: CostModel | str) -> None:
        """One finite, non-negative cost for each choice."""
        space = self.space()
        cost = (COST_MODELS[cost_model] if isinstance(cost_model, str) else cost_model)(space)
        assert cost.cost.shape[:2] == (len(space.groups), len(space.schemes))
        assert np.isfinite(cost.cost).all()
        assert (cost.cost >= 0).all()

    def test_fewer_bits_never_cost_more(self, cost_model: CostModel | str) -> None:
        """Costs rise with the weight bits, and the float model is the dearest."""
        space = self.space()
        cost = (COST_MODELS[cost_model] if isinstance(cost_model, str) else cost_model)(space)
        assert (np.diff(cost.cost, axis=1) >= 0).all()
        assert cost.total([3] * len(space.groups)) <= cost.reference * (1 + 1e-9)
