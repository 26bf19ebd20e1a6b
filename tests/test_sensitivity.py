import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpq
from mpq.errors import ConfigError
from mpq.losses import CallableLoss, KLLoss, MSELoss
from mpq.sensitivity import SensitivityTable, anchored, collector, influence
from mpq.sensitivity.influence import second_order
from mpq.sensitivity.projection import effects
from mpq.space import layer_scheme
from mpq.testing import dense_hessian, prepared, tiny_network, tiny_networks
from mpq.view import preserved_state


def output_hessian(loss, z):
    """Hessian of the mean loss over samples in the outputs, dense ``[B, C, C]`` per sample."""
    if isinstance(loss, MSELoss):
        return torch.eye(z.shape[1], dtype=z.dtype).expand(len(z), -1, -1) * 2 / z.shape[1]
    p = z.softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def dense_form(view, space, calib, bank, loss, pick):
    """``0.5 mean_n d_n^T J_n^T H_n J_n d_n``: J d by a finite shift of layer outputs along the network's tangent."""
    total = 0.0
    layers = space.layers
    for batch in calib.batches:
        with preserved_state(0):
            errors = {}

            def capture(layer, scheme, errors=errors):
                def hook(module, args, output):
                    with torch.no_grad():
                        rounded = bank.inputs(layer, scheme.activation, (args, {}))
                        errors[layer.name] = bank.run(layer, scheme.weight, rounded) - output

                return hook

            handles = [
                view.layers[x.name].register_forward_hook(capture(x, space.schemes[k]))
                for x, k in zip(layers, pick, strict=True)
                if k is not None
            ]
            with view.hooked(handles), torch.no_grad():
                z = view(batch)

            def shifted(t, batch=batch, errors=errors):
                handles = [
                    view.layers[n].register_forward_hook(lambda m, a, out, e=e: out + t * e) for n, e in errors.items()
                ]
                with view.hooked(handles):
                    return view(batch)

            _, jd = torch.func.jvp(shifted, (torch.zeros((), dtype=z.dtype),), (torch.ones((), dtype=z.dtype),))
            total += 0.5 * torch.einsum("nc,ncd,nd->", jd, output_hessian(loss, z), jd).item()
    return total / calib.num_samples


def whole(table, pick):
    """Predicted loss of a pick with all interactions as they were measured: not shrunk."""
    picked = table.rows[:, :, np.arange(len(table.groups)), pick].sum(2)
    return 0.5 * np.square(picked).sum(1).mean()


@pytest.mark.parametrize("schemes", ["W2,W3", "W32A2,W32A4", "W2A3,W3:asymA8"], ids=["weights", "activations", "joint"])
@pytest.mark.parametrize("loss", [KLLoss(), MSELoss()], ids=["kl", "mse"])
def test_influence_equals_the_dense_gauss_newton_form(schemes, loss):
    net, data = tiny_network()
    view, space, calib, bank = prepared(net, data, schemes)
    with preserved_state(0):
        table = influence(view, space, calib, bank, loss, exact=True, progress=False)
    for g in range(len(space.groups)):
        for s in range(len(space.schemes)):
            pick = [s if i == g else None for i in range(len(space.layers))]
            expected = dense_form(view, space, calib, bank, loss, pick)
            assert table.loss[g, s] == pytest.approx(expected, rel=1e-8, abs=1e-14)
    pick = [1, 0, 0, 1]
    assert whole(table, pick) == pytest.approx(dense_form(view, space, calib, bank, loss, pick), rel=1e-8)
    assert whole(table, pick) != pytest.approx(table.total(pick)[0], rel=1e-3)  # interactions are real


@pytest.mark.parametrize("name", tiny_networks())
def test_influence_equals_the_dense_hessian_on_every_kind_of_layer(name):
    """At the float weights the Hessian of the divergence is the Gauss-Newton matrix."""
    net, data = tiny_networks()[name]
    view, space, calib, bank = prepared(net, data, "W2,W4")
    with preserved_state(0):
        table = influence(view, space, calib, bank, KLLoss(), exact=True, progress=False)
    layers = [x for g in space.groups for x in g.layers]
    hessian = dense_hessian(view, calib, KLLoss(), [x.name for x in layers])
    blocks = np.split(np.arange(len(hessian)), np.cumsum([x.parameters for x in layers])[:-1])
    assert len(layers) == len(space.groups)
    errors = [[(bank.weight(x, s.weight) - view.weight(x.name)).flatten() for s in space.schemes] for x in layers]
    for g, block in enumerate(blocks):
        for s in range(2):
            d = errors[g][s]
            assert table.loss[g, s] == pytest.approx(0.5 * float(d @ hessian[block][:, block] @ d), rel=1e-7)
    generator = np.random.default_rng(0)
    for pick in generator.integers(0, 2, (3, len(layers))):
        d = torch.cat([errors[g][s] for g, s in enumerate(pick)])
        assert whole(table, pick) == pytest.approx(0.5 * float(d @ hessian @ d), rel=1e-7)


@pytest.mark.slow
def test_standard_errors_cover_the_truth():
    """Over 200 data sets drawn from a small population: the stated error of entries and of whole configs holds the
    exact sum over all of it."""
    net, _ = tiny_networks()["linear"]
    everyone, pick = torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), [0, 1]

    def losses(x, seed, **options):
        view, space, calib, bank = prepared(net, [x], "W2,W4")
        with preserved_state(seed):
            table = influence(view, space, calib, bank, KLLoss(), seed=seed, progress=False, **options)
        return [*table.loss.flatten(), whole(table, pick)], [*table.stderr.flatten(), table.stderr_of(pick)]

    exact, _ = losses(everyone, 0, exact=True)
    found, stated = [], []
    for seed in range(200):
        drawn = torch.randint(64, (1000,), generator=torch.Generator().manual_seed(seed))
        each = losses(everyone[drawn], seed, draws=1)
        found.append(each[0])
        stated.append(each[1])
    off = (np.array(found) - exact) / np.array(stated)
    covered = (np.abs(off) < 2).mean(0)
    assert ((covered > 0.91) & (covered < 0.99)).all()
    assert (np.abs(off) < 4).all()
    bias = (np.mean(found, 0) - exact) / np.std(found, 0, ddof=1) * 200**0.5
    assert (np.abs(bias) < 4).all()


def test_interactions_are_shrunk_where_samples_are_few():
    net, _ = tiny_networks()["linear"]
    x = torch.randn(400, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = []
    for count in (4, 40, 400):
        view, space, calib, bank = prepared(net, [x[:count]], "W2,W4")
        with preserved_state(0):
            table = influence(view, space, calib, bank, KLLoss(), draws=1, progress=False)
        rows = table.rows.reshape(count, 4)
        products = rows.T @ rows / count
        shares.append(table.interactions[0, 0, 1, 0] / products[0, 2])
    assert 0 <= shares[0] < shares[1] < shares[2] <= 1
    assert shares[2] > 0.9


def one_batch(estimate=influence, mixed=False, samples=6, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), *[Centred()] * mixed).double()
    view, space, calib, bank = prepared(net, list(torch.randn(samples, 4, dtype=torch.float64).split(6)), "W2,W4")
    with preserved_state(0):
        return estimate(view, space, calib, bank, MSELoss(), progress=False, **options)


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize("unit", [{"samples": 1}, {"mixed": True}], ids=["sample", "batch"])
def test_a_single_unit_tells_nothing_of_interactions_and_errors(unit):
    table = one_batch(**unit)
    assert table.rows.any()
    assert not table.interactions.any()
    assert np.isnan(table.stderr).all()
    assert np.isnan(table.stderr_of([0, 1]))


def test_several_batches_tell_of_layers_that_mix_samples():
    table = one_batch(mixed=True, samples=24)
    assert table.batches.tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 6
    assert table.interactions.any()
    assert np.isfinite(table.stderr).all()


def test_layers_that_mix_samples_leave_the_interactions_of_others():
    """Each kind of pair is shrunk by what its own units tell."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 1, 3, 1)) + 1
    rows[:, :, 2] = np.repeat(rng.normal(size=(4, 1, 1)) + 1, 10, 0)  # one value for each of four batches
    over, numbers = np.array([False, False, True]), np.repeat(np.arange(4), 10)
    found = second_order(rows, numbers, over)[1]
    alone = second_order(rows[:, :, :2])[1]
    np.testing.assert_allclose(found[:2, :, :2], alone, rtol=1e-12)
    means = np.stack([rows[numbers == b].transpose(0, 1, 3, 2).reshape(10, 3) for b in range(4)])
    products = np.einsum("bna,bnc->bac", means, means) / 10
    scale = np.sqrt(0.5 * np.square(rows).mean((0, 1, 3)))
    units = products[:, 2, :2] / (scale[2] * scale[:2])
    share = 1 - (units.var(0, ddof=1).sum() / 4) / np.square(units.mean(0)).sum()
    assert 0 < share < 1
    np.testing.assert_allclose(found[2, 0, :2, 0], share * products.mean(0)[2, :2], rtol=1e-9)
    assert not second_order(rows, np.zeros(40, int), over)[1][2].any()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("estimate", [influence, anchored], ids=lambda f: f.__name__)
def test_the_error_of_a_prediction_is_its_jackknife(estimate, mixed):
    """Leave each unit out and predict again, with the table's own shrinkage, corrections and ceiling."""
    options = {"anchors": 6} if estimate is anchored else {}
    table = one_batch(estimate, mixed, 20, **options)  # the last batch is shorter
    assert (table.ceiling < np.inf) == (estimate is anchored)
    units = table.batches if mixed else np.arange(20)
    full = 0.5 * np.einsum("ndgs,ndht->gsht", table.rows, table.rows) / 20
    kept = table.interactions / (2 * full)
    for pick in itertools.product(range(2), repeat=2):
        left = []
        for unit in np.unique(units):
            rows = table.rows[units != unit]
            products = np.einsum("ndgs,ndht->gsht", rows, rows) / len(rows)
            loss = 0.5 * np.einsum("gsgs->gs", products)
            left.append(replace(table, loss=loss, interactions=kept * products).predict(pick))
        expected = np.sqrt((len(left) - 1) * np.var(left))
        assert table.stderr_of(pick) == pytest.approx(expected, rel=1e-9)
        independent = table.total(pick)[1]
        assert table.stderr_of(pick) != pytest.approx(independent, rel=1e-3)
    again = SensitivityTable.from_arrays(table.to_arrays(), "it")
    assert again.stderr_of(pick) == table.stderr_of(pick)


def test_configs_state_the_error_of_what_they_predict(analysis):
    config = analysis.uniform("W3A8")
    pick = [analysis.table.schemes.index("W3A8")] * len(analysis.table.groups)
    assert config.predicted["stderr"] == analysis.table.stderr_of(pick) != analysis.table.total(pick)[1]
    assert f"{config.predicted['with_interactions']:.5g} with interactions +- " in config.summary()


def test_random_probes_estimate_the_exact_sum_within_their_standard_error():
    net, data = tiny_network()
    view, space, calib, bank = prepared(net, data, "W2A4,W4A8")
    exact = influence(view, space, calib, bank, KLLoss(), exact=True, progress=False)
    drawn = influence(view, space, calib, bank, KLLoss(), draws=400, seed=1, progress=False)
    # A probe's square has a relative deviation of at most sqrt(2); 8 samples and 400 draws average it.
    np.testing.assert_allclose(drawn.loss, exact.loss, rtol=4 * (2 / 400) ** 0.5)
    finding_the_batch_axis = 2  # two passes over both batches
    # Each 16 probes share three runs of every layer.
    assert drawn.provenance["forward_passes"] == finding_the_batch_axis + 1 + 800 + 400 / 16 * 3


@pytest.mark.parametrize(
    ("loss", "net", "count"),
    [
        (KLLoss(), nn.Linear(4, 40), 40),
        (KLLoss(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 40), nn.Unflatten(1, (4, 10))), 40),
        (MSELoss(), nn.Sequential(nn.Linear(4, 40), nn.Unflatten(1, (4, 10))), 40),
        (CallableLoss(lambda out, batch: out.square().sum(1)), nn.Linear(4, 40), 1),
    ],
    ids=["classes", "tokens", "elements", "callable"],
)
def test_exact_sums_keep_few_gradients_and_build_each_probe_once(loss, net, count, monkeypatch):
    """Their value is that of all gradients at once."""
    built, kept, every = [], [], type(loss).all_probes

    def counted(self, output, batch):
        for probe in every(self, output, batch):
            built.append(1)
            yield probe

    def watched(bank, layer, schemes, inputs, gradient, *args):
        kept.append(len(gradient))
        return effects(bank, layer, schemes, inputs, gradient, *args)

    monkeypatch.setattr(type(loss), "all_probes", counted)
    monkeypatch.setattr(collector, "effects", watched)
    torch.manual_seed(0)
    view, space, calib, bank = prepared(net.double(), [torch.randn(3, 4, dtype=torch.float64)], "W2A4,W4A8")
    tables = []
    for chunk in (16, 1000):
        monkeypatch.setattr(collector, "_CHUNK", chunk)
        built.clear()
        kept.clear()
        tables.append(influence(view, space, calib, bank, loss, exact=True, progress=False))
        assert len(built) == count
        assert max(kept) == min(chunk, count)
        assert sum(kept) == count * len(space.layers)
    np.testing.assert_allclose(tables[0].rows, tables[1].rows, rtol=1e-9, atol=1e-12)


def test_prediction_matches_measured_divergence_for_small_errors(example, analysis):
    """On the real network: KL predicted with interactions against KL measured on other images, at 4 bits."""
    model, _, test = example
    measured = mpq.Evaluator(model, test[:4], progress=False).measure(analysis.uniform("W4A8"))
    assert analysis.uniform("W4A8").predicted["with_interactions"] == pytest.approx(measured.kl, rel=0.5)


class Repeated(nn.Module):
    """A layer that runs twice, overwrites its own input, and mixes the batch axis into tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.first(x), inplace=True)
        x = self.again(x)
        x += 1
        x = self.again(F.relu(x, inplace=True))
        return self.last(x).mean(1)


def test_repeated_layers_and_in_place_operations_match_a_finite_difference():
    """The effect of a layer with several calls is that of changing all of them."""
    torch.manual_seed(0)
    net = Repeated().double()
    data = [torch.randn(6, 5, 4, dtype=torch.float64)]
    view, space, calib, bank = prepared(net, data, "W3,W4")
    table = influence(view, space, calib, bank, MSELoss(), exact=True, progress=False)
    again = [x.name for x in space.layers].index("again")
    layer = space.layers[again]
    error = bank.weight(layer, space.schemes[0].weight) - view.weight("again")
    eps = 1e-5
    with torch.no_grad():
        reference = view(calib.batches[0])
        with view.swapped({"again": view.weight("again") + eps * error}):
            moved = view(calib.batches[0])
    expected = ((moved - reference) / eps).square().mean().item()
    assert table.loss[again, 0] == pytest.approx(expected, rel=1e-3)


def test_embedding_inputs_are_never_quantized():
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    analysis = mpq.analyze(net, [torch.randint(0, 7, (6, 5))], "W2A8,W4A8", progress=False)
    cfg = analysis.allocate("avg_bits<=4")
    assert cfg["0"].activation is None
    assert cfg["1"].activation.bits == 8
    assert layer_scheme(analysis.space.layers[0], analysis.space.schemes[0]).activation is None


def test_callable_loss_per_sample_and_mean_agree():
    net, data = tiny_network()
    batches = [(x, torch.randint(0, 3, (4,))) for x in data]
    losses = {
        "per sample": lambda out, batch: F.cross_entropy(out, batch[1], reduction="none"),
        "mean": lambda out, batch: F.cross_entropy(out, batch[1]),
    }
    tables = {k: mpq.analyze(net, batches, "W2,W8", loss=f, progress=False).table for k, f in losses.items()}
    np.testing.assert_allclose(tables["per sample"].loss, tables["mean"].loss, rtol=1e-9)
    assert tables["mean"].provenance["loss"] == "callable"


def test_table_round_trip_and_damage(tmp_path, analysis):
    path = analysis.table.save(tmp_path / "table.safetensors")
    again = SensitivityTable.load(path)
    np.testing.assert_array_equal(again.rows, analysis.table.rows)
    assert (again.groups, again.schemes) == (analysis.table.groups, analysis.table.schemes)
    assert again.provenance == analysis.table.provenance
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="not a sensitivity table"):
        SensitivityTable.load(path)
    from safetensors.numpy import save_file

    save_file({"x": np.ones(2)}, path)
    with pytest.raises(ConfigError, match="of version 2"):
        SensitivityTable.load(path)
