import matplotlib as mpl
import pytest

from mpq.config import Measured
from mpq.viz import plot_bits, plot_frontier, plot_measured

mpl.use("Agg")


@pytest.fixture(scope="module")
def cfg(analysis):
    return analysis.allocate("avg_bits<=4").with_measured(Measured(10, 0.9, 0.3, 0.01, 0.95))


def test_frontier_plot_shows_points_uniform_schemes_and_marks(analysis, cfg):
    front = analysis.pareto()
    ax = front.plot(mark=[cfg])
    assert ax is not plot_frontier(front)
    texts = {t.get_text() for t in ax.texts}
    assert {"W2A8", "W3A8", "W4A8", "W8A8", "avg_bits<=4"} <= texts
    assert ax.get_yscale() == "log"
    assert ax.get_xlabel() == "size (kB)"
    points = ax.collections[0].get_offsets()
    assert points[:, 0].tolist() == pytest.approx((front.cost / 1e3).tolist())
    assert points[:, 1].tolist() == pytest.approx(front.loss.tolist())


def test_bits_plot_has_one_bar_for_each_layer(cfg):
    heights = [bar.get_height() for bar in plot_bits(cfg).containers[0]]
    assert heights == [c.weight.bits for c in cfg.layers.values()]


def test_measured_plot_draws_accuracy_in_per_cent(cfg):
    ax = plot_measured({"mixed": [cfg]})
    assert ax.lines[0].get_ydata().tolist() == [90.0]
    assert ax.lines[1].get_ydata()[0] == 95.0  # float
