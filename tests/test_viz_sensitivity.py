import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from mpq.errors import MpqError
from mpq.sensitivity import SensitivityTable, dependency
from mpq.viz.sensitivity import plot_interactions, plot_sensitivity

mpl.use("Agg")


def table_of(groups=3, interactions=True):
    loss = np.array([[0.5, 0.02, 0.001]]) * np.arange(1, groups + 1)[:, None]
    stderr = np.full_like(loss, 0.01)
    stderr[0, 1] = np.nan
    loss[-1, 2] = 0
    pairs = np.random.default_rng(0).normal(size=(groups, 3, groups, 3)) * 0.01
    pairs += pairs.transpose(2, 3, 0, 1)
    pairs[np.arange(groups), :, np.arange(groups)] = 0
    names = tuple(f"layer{i}" for i in range(groups)), ("W2", "W4", "W8")
    return SensitivityTable(*names, loss, stderr, pairs if interactions else None, provenance={"loss": "kl"})


def labels(axis):
    return [t.get_text() for t in axis.get_ticklabels()]


def test_losses_with_two_standard_errors_on_a_log_axis():
    table = table_of()
    ax = plot_sensitivity(table)
    assert ax.get_yscale() == "log"
    assert "KL" in ax.get_ylabel()
    assert labels(ax.xaxis) == list(table.groups)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(table.schemes)
    curves = [c for c in ax.containers if isinstance(c, ErrorbarContainer)]
    for s, curve in enumerate(curves):
        line, _, (bars,) = curve
        shown = table.loss[:, s] > 0  # a log axis has no place for zero
        assert line.get_xdata().tolist() == np.flatnonzero(shown).tolist()
        assert line.get_ydata().tolist() == table.loss[shown, s].tolist()
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        loss, error = table.loss[shown, s], np.nan_to_num(table.stderr[shown, s])
        np.testing.assert_allclose(ends[:, 1], loss + 2 * error)
        np.testing.assert_allclose(ends[:, 0], loss - np.minimum(2 * error, 0.9 * loss))
    assert len(curves) == 3


def test_interactions_are_correlations_around_zero():
    table = table_of()
    ax = plot_interactions(table, "W4")
    expected = dependency(table, "W4").correlation
    np.fill_diagonal(expected, np.nan)
    (image,) = ax.images
    np.testing.assert_allclose(image.get_array().filled(np.nan), expected)
    low, high = image.get_clim()
    assert -low == high == pytest.approx(np.nanmax(np.abs(expected)))
    assert labels(ax.xaxis) == labels(ax.yaxis) == list(table.groups)
    assert ax.get_title() == "Interactions at W4"
    assert plot_interactions(table).get_title() == "Interactions at W2"  # of the largest total loss
    with pytest.raises(MpqError, match="no interactions"):
        plot_interactions(table_of(interactions=False))


def test_axes_are_given_or_made_and_labels_thinned():
    table = table_of(150)
    given = Figure().add_subplot()
    assert table.plot(given) is given
    assert labels(given.xaxis) == list(table.groups[::3])
    assert table.plot() is not table.plot()
    heat = Figure().add_subplot()
    assert plot_interactions(table, ax=heat) is heat
    assert labels(heat.yaxis) == list(table.groups[::3])
