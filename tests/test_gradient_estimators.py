"""What all estimators that reduce gradients refuse, and leave alone."""

import pytest
import torch
from estimators import NETWORKS, SCHEMES, run
from torch import nn

from mpq.errors import DataError, GraphError, MpqError
from mpq.losses import CallableLoss, KLLoss
from mpq.sensitivity.fisher_trace import fisher_trace
from mpq.sensitivity.saliency import gradient_saliency, output_channel_salience
from mpq.sensitivity.squared_gradient import squared_gradient
from mpq.sensitivity.weight_importance import weight_importance
from mpq.testing import prepared

GRADIENT_ESTIMATORS = [fisher_trace, squared_gradient, gradient_saliency, output_channel_salience, weight_importance]


@pytest.mark.parametrize("estimator", GRADIENT_ESTIMATORS)
def test_missing_or_unfit_labels_are_named(estimator):
    net, data = NETWORKS["linear"]
    with pytest.raises(DataError, match="batch 0 of the data has no class labels"):
        run(estimator, prepared(net, data, "W2"), KLLoss(), labels="true")
    with pytest.raises(MpqError, match="unknown labels 'some'"):
        run(estimator, prepared(net, data, "W2"), KLLoss(), labels="some")
    wrong = [(x, torch.full((len(x),), 3)) for x in data]
    with pytest.raises(DataError, match="not one of the model's 3 classes"):
        run(estimator, prepared(net, wrong, "W2"), KLLoss(), labels="true")
    tokens = [(x, torch.zeros(len(x), 2, dtype=torch.long)) for x in data]
    with pytest.raises(DataError, match="don't fit"):
        run(estimator, prepared(net, tokens, "W2"), KLLoss(), labels="true")


@pytest.mark.parametrize("estimator", [fisher_trace, gradient_saliency, output_channel_salience, weight_importance])
def test_a_mean_over_samples_is_refused_where_it_hides_them(estimator):
    net, data = NETWORKS["linear"]
    mean = CallableLoss(lambda output, batch: output.square().mean())
    with pytest.raises(MpqError, match="one loss per sample"):
        run(estimator, prepared(net, data, "W2"), mean)
    run(estimator, prepared(net, [x[i : i + 1] for x in data for i in range(len(x))], "W2"), mean)


@pytest.mark.parametrize("estimator", GRADIENT_ESTIMATORS)
def test_the_data_get_no_gradients(estimator):
    net, data = NETWORKS["linear"]
    data = [x.clone().requires_grad_() for x in data]
    run(estimator, prepared(net, data, SCHEMES), KLLoss())
    assert all(x.grad is None for x in data)


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.first(x).detach())


@pytest.mark.parametrize("estimator", GRADIENT_ESTIMATORS)
def test_layers_without_gradient_are_named(estimator):
    with pytest.raises(GraphError, match="no gradient reaches layer 'first'"):
        run(estimator, prepared(Detached(), [torch.randn(4, 4)], "W2"), KLLoss())


@pytest.mark.parametrize("estimator", GRADIENT_ESTIMATORS)
def test_infinite_gradients_are_named(estimator):
    net, data = NETWORKS["linear"]
    # The root's derivative at zero is infinite.
    loss = CallableLoss(lambda output, batch: (output - output.detach()).abs().sum(1).sqrt())
    with pytest.raises(DataError, match="is NaN or infinite"):
        run(estimator, prepared(net, data, "W2"), loss)
