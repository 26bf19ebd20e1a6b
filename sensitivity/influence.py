"""Influence: how the real quantization error of each layer moves the loss of each sample.

One forward pass per batch and one backward pass per probe. At every layer the output error of every scheme,
``d = Q(layer)(x) - layer(x)``, is projected on the gradient of a loss probe (`mpq.losses.OutputLoss.probe`):
``s[n, layer, scheme] = <u_n^T dz_n/dy, d_n>``. With ``E[u u^T] = H``, half the mean of ``s**2`` is the Gauss-Newton
form ``0.5 d^T J^T H J d`` of the loss: the second-order rise of the loss for this very perturbation (Schraudolph,
2002, for the Gauss-Newton matrix). Sums of ``s`` over layers give the same form for whole configs, so that all
pairwise interactions come with the same passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpq.bank import QuantizerBank
from mpq.calibration import Batch, Calibration
from mpq.errors import MpqError
from mpq.layers import LayerSpec
from mpq.losses import OutputLoss
from mpq.problem import Floats, Ints
from mpq.progress import progress_bar
from mpq.quantizers import Scheme
from mpq.sensitivity.collector import Collector
from mpq.sensitivity.rows import Layouts, check_reached, layouts_of
from mpq.sensitivity.spread import batch_numbers, standard_error
from mpq.sensitivity.table import SensitivityTable
from mpq.space import SearchSpace, layer_scheme
from mpq.store import ScoreStore
from mpq.view import ModelView, preserved_state


def influence(
    view: ModelView,
    space: SearchSpace,
    data: Calibration,
    bank: QuantizerBank,
    loss: OutputLoss,
    *,
    draws: int = 2,
    exact: bool = False,
    executor: Executor | None = None,
    store: ScoreStore | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SensitivityTable:
    """Predicted loss of every scheme of every group, with all pairwise interactions.

    Args:
        view: The model.
        space: Groups and schemes.
        data: Calibration data.
        bank: Quantized weights and activation ranges.
        loss: What is protected.
        draws: Random probes per sample; more of them lower the standard error towards that of the data alone. With one,
            memory stays near that of a training step.
        exact: Sum over all output classes (or elements) instead of drawing: one backward pass for each.
        executor: Where to run the batches; their rows are joined in order, so that the result is the same.
        store: Where to keep each batch's rows of each scheme, and to look for them first.
        seed: Of the probes; each batch draws its own from the seed and its content.
        progress: Show a bar.

    Returns:
        A table whose loss is in the unit of ``loss``, standard errors over samples, shrunk interactions and rows. A
        layer whose output belongs to the whole batch (position embeddings, routed tokens) has standard errors over
        batches, and smaller interactions.

    Raises:
        DataError: If a gradient or an error is NaN or infinite, naming the layer.
        GraphError: If no gradient reaches a layer that matters.
        MpqError: If ``exact`` or a loss without a value per sample meets a layer that mixes samples.
    """
    layouts, passes = layouts_of(view, [x.name for x in space.layers], data)
    job = _Job(view, space.layers, space.schemes, bank, loss, layouts, 0 if exact else draws, seed, store)
    jobs = [replace(job, batch=batch) for batch in data.batches]
    results: Iterator[_Rows] = map(_run, jobs) if executor is None else executor.map(_run_apart, jobs)
    found = list(progress_bar(results, "influence", progress, total=len(jobs)))
    unreached = {x.name for x in space.layers}.difference(*(r.reached for r in found))
    check_reached(view, sorted(unreached), data.batches)
    passes += sum(r.passes * b.size for r, b in zip(found, data.batches, strict=True)) / data.num_samples
    mixed = set[str]().union(*(r.mixed for r in found))
    provenance = {
        "estimator": "influence",
        "draws": "exact" if exact else draws,
        "loss": loss.name,
        "mixed_layers": sorted(mixed),
        "forward_passes": round(passes, 2),
    }
    return _table(space, [r.effects for r in found], mixed, provenance)


@dataclass(frozen=True)
class _Job:
    """All that one batch needs; it can be sent to another process."""

    view: ModelView
    layers: tuple[LayerSpec, ...]
    schemes: tuple[Scheme, ...]
    bank: QuantizerBank
    loss: OutputLoss
    layouts: Layouts
    draws: int  # 0: the exact sum
    seed: int
    store: ScoreStore | None
    batch: Batch | None = None


@dataclass(frozen=True)
class _Rows:
    """Effects ``[samples, draws, layers, schemes]`` of one batch, and what was seen on the way."""

    effects: Floats
    reached: set[str]
    mixed: set[str]
    passes: float


def _run_apart(job: _Job) -> _Rows:
    """In a thread or process of its own: hooks and swapped weights must be its own, too."""
    view = job.view.twin()
    with preserved_state(job.seed):
        return _run(replace(job, view=view, bank=job.bank.on(view)))


def _run(job: _Job) -> _Rows:
    """Rows of one batch: what the store holds, and the rest measured."""
    assert job.batch is not None
    if job.store is None:
        return _measure(job, job.batch, job.schemes)
    names = [x.name for x in job.layers]
    content: dict[str, Any] = {"batch": job.batch.content_hash, "draws": job.draws, "seed": job.seed}
    # More data may tell that samples are not where they seemed to be.
    content["layouts"] = sorted(job.layouts.items())
    shelf = job.store.within(estimator="influence", layers=names, **content)
    keys = [{"scheme": str(s), "ranges": _ranges(job, s), **_rounded_for(job.bank, s)} for s in job.schemes]
    known = [shelf.get(**k) for k in keys]
    missing = tuple(s for s, k in zip(job.schemes, known, strict=True) if k is None)
    passes = 0.0
    if missing:
        rows = _measure(job, job.batch, missing)
        passes = rows.passes
        flags = {
            "reached": np.array([n in rows.reached for n in names]),
            "mixed": np.array([n in rows.mixed for n in names]),
        }
        for i, scheme in enumerate(missing):
            s = job.schemes.index(scheme)
            known[s] = {"effects": rows.effects[..., i], **flags}
            shelf.put(known[s] or {}, **keys[s])
    entries = [k for k in known if k is not None]
    effects = np.stack([k["effects"] for k in entries], -1)
    reached, mixed = ({n for n, on in zip(names, entries[0][k], strict=True) if on} for k in ("reached", "mixed"))
    return _Rows(effects, reached, mixed, passes)


def _rounded_for(bank: QuantizerBank, scheme: Scheme) -> dict[str, str]:
    """The data that a scheme's weights are rounded for, if they are rounded for any."""
    return {"rounded_for": bank.about(scheme)} if bank.about(scheme) else {}


def _measure(job: _Job, batch: Batch, schemes: tuple[Scheme, ...]) -> _Rows:
    # A batch's probes depend on nothing but the seed and its content: not on its place, nor on what is in the store.
    generator = torch.Generator().manual_seed(int(batch.content_hash[:8], 16) ^ job.seed)
    collector = Collector(job.view, job.layers, schemes, job.bank, batch, job.layouts)
    output = collector.forward()
    if job.draws:
        draws = job.draws
        probes = (job.loss.probe(output, batch, generator) for _ in range(draws))
    else:
        draws = job.loss.count_probes(output, batch)
        probes = (p for p in job.loss.all_probes(output, batch))
    effects = collector.backward(probes, draws).numpy() * (job.draws**-0.5 if job.draws else 1.0)
    if collector.mixed and not (job.draws and job.loss.by_sample(output, batch)):
        what = "a loss that returns one mean for the batch" if job.draws else "exact=True"
        raise MpqError(
            f"layer {min(collector.mixed)!r} mixes the samples of a batch, which {what} can't tell apart; "
            + ("return one loss per sample, or use batches of one sample" if job.draws else "use random draws")
        )
    # A backward pass counts as two forward passes.
    return _Rows(effects, collector.reached, collector.mixed, 1 + 2 * draws + collector.runs)


def _ranges(job: _Job, scheme: Scheme) -> list[Any]:
    """Activation ranges come from the whole data, so that they are a part of the address."""
    if scheme.activation is None:
        return []
    return [job.bank.range(x, layer_scheme(x, scheme).activation) for x in job.layers]


def _table(space: SearchSpace, effects: list[Floats], mixed: set[str], provenance: dict[str, Any]) -> SensitivityTable:
    """Join the effects of all batches; layers become groups."""
    column = {layer.name: i for i, layer in enumerate(space.layers)}
    members = [[column[x.name] for x in g.layers] for g in space.groups]
    grouped = [np.stack([rows[:, :, m].sum(2) for m in members], 2) for rows in effects]
    # Each sample's share of the mean loss: half its squared effects, summed over draws [N, G, S].
    shares: Floats = np.concatenate([0.5 * np.square(e).sum(1) for e in grouped])
    stderr, rows = standard_error(shares), _same_draws(grouped)
    # Rows of a layer that mixes samples are the same for all of a batch.
    over_batches = np.array([bool(mixed & {x.name for x in group.layers}) for group in space.groups])
    batches = batch_numbers(map(len, grouped)) if over_batches.any() else None
    stderr[over_batches] = standard_error(shares[:, over_batches], batches)
    interactions = second_order(rows, batches, over_batches)[1]
    names = tuple(g.name for g in space.groups), tuple(map(str, space.schemes))
    return SensitivityTable(*names, shares.mean(0), stderr, interactions, rows, batches=batches, provenance=provenance)


def _same_draws(grouped: list[Floats]) -> Floats:
    """Rows of all batches ``[N, D, G, S]``; exact sums over tokens may have more draws in one batch than in another."""
    draws = max(e.shape[1] for e in grouped)
    return np.concatenate([np.pad(e, ((0, 0), (0, draws - e.shape[1]), (0, 0), (0, 0))) for e in grouped])


def second_order(
    rows: Floats, batches: Ints | None = None, over_batches: NDArray[np.bool_] | None = None
) -> tuple[Floats, Floats]:
    """Losses ``[G, S]`` and shrunk interactions ``[G, S, G, S]`` of rows ``[N, D, G, S]``.

    Products of effects, averaged over few samples, are noisy. All interactions are multiplied by the share of their
    squares, in units of the losses, that is not noise (Ledoit and Wolf, 2004, for covariances); the losses stay. One
    sample alone can't tell, so that nothing is left of them then.

    Args:
        rows: Effects.
        batches: Number of each row's batch ``[N]``.
        over_batches: Groups ``[G]`` whose rows are one of each batch: their interactions have a share of their own, for
            which batches are what is independent.
    """
    N, D, G, S = rows.shape
    flat = rows.reshape(N, D, G * S)
    losses = 0.5 * np.square(flat).sum(1).mean(0)
    products = np.einsum("nda,ndb->ab", flat, flat, optimize=True) / N
    scale = np.sqrt(np.maximum(losses, 1e-300))
    between = ~np.kron(np.eye(G, dtype=bool), np.ones((S, S), dtype=bool)) & (losses > 0) & (losses > 0)[:, None]
    apart = np.repeat(np.ones(G, bool) if over_batches is None else ~over_batches, S)
    by_sample = between & apart & apart[:, None]
    shares = np.where(by_sample, _signal(flat / scale, None, by_sample), 0.0)
    if not apart.all():
        rest = between & ~by_sample
        shares[rest] = _signal(flat / scale, batches, rest)
    return losses.reshape(G, S), (shares * products).reshape(G, S, G, S)


def _signal(unit: Floats, batches: Ints | None, pairs: NDArray[np.bool_]) -> float:
    """Share of the squared mean products of effects ``[N, D, A]`` that is no noise, over some pairs ``[A, A]``."""
    N, _, A = unit.shape
    counts = np.ones(N, np.int64) if batches is None else np.bincount(batches)
    if len(counts) < 2:
        return 0.0
    mean = np.einsum("nda,ndb->ab", unit, unit, optimize=True) / N
    noise = np.zeros((A, A))
    for part in np.split(unit, np.cumsum(counts)[:-1]):
        flat = part.reshape(-1, A)
        noise += np.square((flat.T @ flat - len(part) * mean) / N)
    signal = np.square(mean)[pairs].sum()
    lost = noise[pairs].sum() * len(counts) / (len(counts) - 1)
    return float(np.clip(1 - lost / signal, 0, 1)) if signal > 0 else 0.0
