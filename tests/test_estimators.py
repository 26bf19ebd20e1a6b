"""What holds for every estimator that has a name, with its default options."""

import json
import os
import subprocess
import sys

import pytest

from mpq.sensitivity import ESTIMATORS
from mpq.testing import EstimatorContract

SCRIPT = """
import json, sys, torch
from mpq.sensitivity import ESTIMATORS
from mpq.testing import EstimatorContract

torch.set_num_threads(1)
for name in ESTIMATORS:
    table = EstimatorContract().analysis(name, seed=3).table
    print(json.dumps([name, table.loss.tobytes().hex(), table.stderr.tobytes().hex()]))
"""


class TestContract(EstimatorContract):
    @pytest.fixture(params=ESTIMATORS)
    def estimator(self, request):
        return request.param


@pytest.mark.parametrize("name", ["zd", "weight_sqnr"])
def test_weights_alone_cost_no_forward_pass(name):
    table = EstimatorContract().analysis(name).table
    assert (table.stderr == 0).all()
    assert table.provenance["forward_passes"] == 1  # of the activation ranges, which are not the estimator's


@pytest.mark.slow
def test_a_seed_gives_the_same_bytes_in_another_process():
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=environment)
    found = {name: (loss, stderr) for name, loss, stderr in map(json.loads, done.stdout.splitlines())}
    assert list(found) == list(ESTIMATORS)
    for name in ESTIMATORS:
        table = EstimatorContract().analysis(name, seed=3).table
        assert found[name] == (table.loss.tobytes().hex(), table.stderr.tobytes().hex()), name
