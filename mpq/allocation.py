"""The calls that users make: `allocate`, `pareto` and `analyze`, which both start from."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpq import __version__
from mpq.analysis import Analysis, Budgets, find_solver
from mpq.bank import QuantizerBank
from mpq.budget import Budget, parse_budgets
from mpq.calibration import Calibration, model_hash
from mpq.config import BitConfig
from mpq.cost_models import COST_MODELS, Cost, Device, default_costs, find_device
from mpq.errors import BudgetError, MpqError
from mpq.evaluation import Evaluator
from mpq.export.runtimes import Runtime, find_runtime
from mpq.frontier import Frontier
from mpq.kept_codes import refuse_quantized
from mpq.layers import LayerGraph
from mpq.loss_ranges import choose_ranges
from mpq.losses import OutputLoss, UserLoss, check_finite_output, resolve_loss
from mpq.quantizers import Scheme, parse_schemes
from mpq.search import Solver
from mpq.sensitivity import Estimator, SensitivityTable
from mpq.sensitivity.gate import check
from mpq.sensitivity.options import find_estimator
from mpq.sensitivity.storing import open_store, stored
from mpq.space import SearchSpace, layer_scheme, make_space
from mpq.studies import search
from mpq.trace import trace
from mpq.view import Forward, ModelView, Network, plain, preserved_state
from mpq.warning import warn

DEFAULT_SCHEMES = "W2A8,W3A8,W4A8,W8A8"
_EXPECTED_COVERAGE = 0.8
_READING = ("seed", "max_samples", "forward")  # options that say which batches are read


def analyze(
    model: Network,
    calib: Iterable[Any],
    schemes: str | Iterable[str | Scheme] | None = None,
    *,
    loss: str | UserLoss | OutputLoss = "auto",
    estimator: str | Estimator = "anchored",
    estimator_options: Mapping[str, Any] | None = None,
    device: str | Device = "generic",
    pin: Mapping[str, str | Scheme] | None = None,
    skip: Sequence[str] = (),
    groups: Iterable[Sequence[str]] = (),
    share_inputs: bool | None = None,
    weight_range: str = "mse",
    activation_range: str = "mse",
    max_samples: int | None = 512,
    forward: Forward | None = None,
    runtime: str | Runtime | None = None,
    budget: Budgets | None = None,
    store: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Analysis:
    """Measure a model once; every budget is then solved from the result without touching the model again.

    Args:
        model: A trained network; its weights, mode, hooks and the random state stay as they are. Its own forward hooks
            run in every pass, as they do for its user.
        calib: Calibration batches: any iterable of tensors, tuples or dicts, or a DataLoader. No labels are needed.
        schemes: What each layer may have, such as ``"W2A8,W4A8,W8A8"``. None: `DEFAULT_SCHEMES`, or for a runtime that
            does not load these, common ones that it loads.
        loss: What is protected: ``auto`` (KL to the float model for logits, squared error otherwise), ``kl``,
            ``mse`` or a callable ``(output, batch) -> loss``.
        estimator: A name in `mpq.sensitivity.ESTIMATORS` or an estimator.
        estimator_options: Keywords for the estimator, such as ``{"draws": 4}``.
        device: Name of a profile (see ``mpq devices``); schemes without a kernel there are left out.
        pin: Layer name or glob -> the scheme it must have, such as ``{"fc": "W8A8"}``.
        skip: Layer names or globs to leave float.
        groups: Lists of layer names or globs that must share a scheme.
        share_inputs: Whether layers that read one tensor must share a scheme; None: where activation formats are
            searched too, since the tensor is quantized once.
        weight_range: Range rule of weights, see `mpq.quantizers.find_range`.
        activation_range: Range rule of activations; or ``loss``: the clip of each layer's input, out of 8 (``loss:N``:
            out of N), after which the protected loss rises least (PD-Quant, see `mpq.loss_ranges`). For each input and
            activation format that is 8 (N) forward passes, from the layer on that reads it, over the first whole
            batches with at least 64 samples.
        max_samples: Use at most about this many samples (whole batches); None takes all.
        forward: ``(model, batch) -> output`` where batches are not what the model's ``forward`` takes.
        runtime: Name in `mpq.export.RUNTIMES`, such as ``"vllm"``: only what that tool can load is searched.
        budget: Budgets that will be asked for: if they can't be met, say so before measuring.
        store: Folder that keeps what was measured (`mpq.store.ScoreStore`): a killed run resumes from it, and more data
            or schemes measure only what is missing.
        seed: Of everything random.
        progress: Show bars for what takes over two seconds.

    Raises:
        MpqError: With a message that names the layer, batch or option at fault, before any long work.
    """
    estimate = find_estimator(estimator, estimator_options or {})
    found_device, found_runtime = find_device(device), None if runtime is None else find_runtime(runtime)
    parsed = parse_schemes(_default_schemes(found_runtime) if schemes is None else schemes)
    groups = list(groups)
    model = plain(model)
    refuse_quantized(model)
    with preserved_state(seed):
        view = ModelView(model, forward)
        data = Calibration.load(calib, view.read, max_samples)
        if data.alike:
            warn(f"all {data.num_samples} calibration samples have the same inputs")
        with torch.no_grad():
            output = view(data.batches[0])
        check_finite_output(output, "on the first calibration batch")
        resolved = resolve_loss(loss, output)
        _check_loss(resolved, output, data)
        graph = trace(view, data.batches[0])
        _warn_of_low_coverage(graph)
        limits: dict[str, Any] = {"pin": pin, "skip": skip, "groups": groups, "share_inputs": share_inputs}
        space = make_space(graph, parsed, **limits, device=found_device, runtime=found_runtime)
        costs = default_costs(space)
        if budget is not None:
            wanted = parse_budgets(budget)
            costs |= {b.metric: COST_MODELS[b.metric](space) for b in wanted if b.metric in COST_MODELS.keys() - costs}
            _check_reachable(space, costs, wanted)
        bank = QuantizerBank(view, graph, weight_range, activation_range, data, progress)
        shelf = None if store is None else open_store(store, model, forward, data, graph, bank, resolved)
        bank.prepare(space.schemes, progress)
        bank.observe(data, progress)
        passes = bank.passes + choose_ranges(view, space, data, bank, resolved, progress)
        run = partial(estimate, view, space, data, bank, resolved, seed=seed, progress=progress)
        table = stored(run, dict(estimator_options or {}), shelf, data=data.hash, space=space, seed=seed)
        gate = check(table, space)
        gate.warn()
        table, space = gate.table, gate.space
        ranges = _ranges(space, bank)
    name = estimator if isinstance(estimator, str) else getattr(estimator, "__name__", type(estimator).__name__)
    provenance = {
        "model_hash": model_hash(model),
        "data_hash": data.hash,
        **({"data_hash_without": data.opaque} if data.opaque else {}),
        "samples": data.num_samples,
        "seed": seed,
        "estimator": name,
        "loss": resolved.name,
        # For activation ranges and for weights that are rounded with an eye to their inputs, then the estimator's own.
        "forward_passes": round(1 + passes + float(table.provenance.get("forward_passes", 0.0)), 2),
        "weight_range": weight_range,
        "activation_range": activation_range,
        "device": found_device.name,
        **({} if found_runtime is None else {"runtime": found_runtime.name}),
        "schemes": [str(s) for s in parsed],
        "constraints": {
            "pin": {k: str(v) for k, v in (pin or {}).items()},
            "skip": list(skip),
            "groups": [list(g) for g in groups],
            **({} if share_inputs is None else {"share_inputs": share_inputs}),
        },
        "estimator_options": {k: repr(v) for k, v in (estimator_options or {}).items()},
        "model_class": type(model).__name__,
        "findings": gate.provenance(),
        "coverage": {"parameters": graph.parameter_coverage, "macs": graph.mac_coverage},
        "versions": _versions(),
    }
    table = replace(table, provenance={**table.provenance, **provenance})
    return Analysis(space, table, costs, ranges, provenance)


def allocate(
    model: Network,
    calib: Iterable[Any],
    budget: Budgets,
    schemes: str | Iterable[str | Scheme] | None = None,
    *,
    solver: str | Solver = "auto",
    eval_data: Iterable[Any] | None = None,
    **options: Any,
) -> BitConfig:
    """The per-layer bits that cost the least accuracy under budgets.

    Args:
        model: A trained network, or the path of an ONNX file (see `mpq.onnx_in`); never touched.
        calib: Calibration batches: any iterable of tensors, tuples or dicts, or a DataLoader. No labels are needed.
        budget: One or several: ``"size<=25%"`` (of the float model), ``"size<=300KB"``, ``"avg_bits<=4"``,
            ``"stored_bits<=4.5"``, ``"bitops<=2G"``, ``"latency<=2ms"``, ``"energy<=1mJ"``, ``"peak_memory<=2MB"``
            (time needs a ``device`` with figures; `mpq.cost_models.COST_MODELS` has all metrics); or
            ``"accuracy_drop<=0.5%"`` (percentage points, measured on ``eval_data``): then the smallest config within it
            that bisection over sizes finds.
        schemes: What each layer may have; see `analyze` for None.
        solver: ``auto``, a name in `mpq.search.SOLVERS`, or a solver.
        eval_data: Labelled batches; if given, the result is measured on them.
        **options: As for `analyze`.

    Raises:
        MpqError: With a message that names what is wrong and the fix.

    Example:
        >>> from mpq.bundled import load_example
        >>> model, calib, test = load_example()
        >>> cfg = allocate(model, calib[:1], "avg_bits<=4", "W2A8,W8A8", estimator="influence", progress=False)
        >>> cfg.avg_bits <= 4, len(cfg)
        (True, 22)
    """
    return allocate_and_analyze(model, calib, budget, schemes, solver=solver, eval_data=eval_data, **options)[0]


def allocate_and_analyze(
    model: Network,
    calib: Iterable[Any],
    budget: Budgets,
    schemes: str | Iterable[str | Scheme] | None = None,
    *,
    solver: str | Solver = "auto",
    eval_data: Iterable[Any] | None = None,
    **options: Any,
) -> tuple[BitConfig, Analysis]:
    """`allocate`, and the analysis that its config comes from."""
    model = plain(model)
    budgets = parse_budgets(budget)
    drop = next((b for b in budgets if b.metric == "accuracy_drop"), None)
    if drop is not None and eval_data is None:
        raise BudgetError(f"{drop.text} must be measured: pass eval_data=labelled batches (--eval on the command line)")
    if solver != "auto":
        solver = find_solver(solver)
    progress = bool(options.get("progress", True))
    evaluator = None
    if eval_data is not None:
        pinned = [s if isinstance(s, Scheme) else Scheme.parse(s) for s in (options.get("pin") or {}).values()]
        if any(s.weight.needs_data for s in (*parse_schemes(schemes or DEFAULT_SCHEMES), *pinned)):
            calib = kept_batches(model, calib, **{k: options[k] for k in _READING if k in options})
        evaluator = Evaluator(model, eval_data, forward=options.get("forward"), calib=calib, progress=progress)
        if drop is not None:
            evaluator.require_accuracy()
    others = tuple(b for b in budgets if b is not drop)
    analysis = analyze(model, calib, schemes, budget=others or None, **options)
    if drop is not None and evaluator is not None:
        found = search(analysis, evaluator, budgets, evaluations=None, solver=solver, progress=progress)
        return found.config, analysis
    config = analysis.config_for(others, analysis.solve(others, solver))
    return (config if evaluator is None else config.with_measured(evaluator.measure(config))), analysis


def _default_schemes(runtime: Runtime | None) -> str | list[Scheme]:
    """The usual ones where a runtime loads at least two of them."""
    if runtime is None or sum(map(runtime.supports, parse_schemes(DEFAULT_SCHEMES))) > 1:
        return DEFAULT_SCHEMES
    return runtime.examples()


def kept_batches(
    model: Network,
    calib: Iterable[Any],
    *,
    seed: int = 0,
    max_samples: int | None = 512,
    forward: Forward | None = None,
) -> list[Any]:
    """Calibration batches that can be read more than once: a generator can't, and a shuffling loader differs."""
    with preserved_state(seed):
        return [b.raw for b in Calibration.load(calib, ModelView(model, forward).read, max_samples).batches]


def pareto(
    model: Network,
    calib: Iterable[Any],
    schemes: str | Iterable[str | Scheme] | None = None,
    *,
    metric: str = "size",
    **options: Any,
) -> Frontier:
    """All best trade-offs between predicted loss and a cost; any budget can then be asked of it.

    Args:
        model: A trained network, or the path of an ONNX file (see `mpq.onnx_in`); never touched.
        calib: Calibration batches, as for `allocate`.
        schemes: What each layer may have; see `analyze` for None.
        metric: The cost on the horizontal axis: a name in `mpq.cost_models.COST_MODELS`.
        **options: As for `analyze`.

    Raises:
        MpqError: With a message that names what is wrong and the fix.
    """
    if metric not in COST_MODELS:
        raise BudgetError(f"no cost model for {metric!r}; known: {', '.join(COST_MODELS)}")
    return analyze(model, calib, schemes, **options).pareto(metric)


def _check_reachable(space: SearchSpace, costs: dict[str, Cost], budgets: tuple[Budget, ...]) -> None:
    """Solve with all losses zero: only the budgets matter.

    Raises:
        BudgetError: If they can't be met together.
    """
    nothing = np.zeros(space.allowed.shape)
    names = tuple(g.name for g in space.groups), tuple(map(str, space.schemes))
    Analysis(space, SensitivityTable(*names, nothing, nothing), costs, {}, {}).solve(budgets)


def _warn_of_low_coverage(graph: LayerGraph) -> None:
    """Say so where budgets can move only part of the network."""
    others = [o for o in graph.outside if o.kind != "rest"]  # biases are nobody's surprise
    left_out = sum(o.parameters for o in others)
    if graph.parameters < _EXPECTED_COVERAGE * (graph.parameters + left_out):
        largest = sorted(others, key=lambda o: -o.parameters)[:3]
        names = "; ".join(f"{o.name} ({o.parameters:,} parameters): {o.reason}" for o in largest)
        warn(
            f"only {graph.parameter_coverage:.0%} of the parameters are in layers that mpq can search. The largest "
            f"outside: {names}"
        )


def _check_loss(loss: OutputLoss, output: Any, data: Calibration) -> None:
    value = loss.value(output, output, data.batches[0])
    if not torch.isfinite(value).all():
        raise MpqError(f"the {loss.name} loss of the float model is NaN or infinite on the first calibration batch")


def _ranges(space: SearchSpace, bank: QuantizerBank) -> dict[tuple[str, str], tuple[float, float]]:
    found = {}
    for layer in space.layers:
        for scheme in {layer_scheme(layer, s) for s in space.schemes}:
            limits = bank.range(layer, scheme.activation)
            if limits is not None:
                found[layer.name, str(scheme)] = limits
    return found


def _versions() -> dict[str, str]:
    return {
        "mpq": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
