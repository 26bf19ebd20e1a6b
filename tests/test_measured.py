import pytest

from mpq.search import Genetic, Nsga2, OptunaSearch, RandomSearch, Refine, Sweep
from mpq.testing_search import SearchContract


class TestRandomSearch(SearchContract):
    @pytest.fixture
    def search(self):
        return RandomSearch()


class TestRefine(SearchContract):
    @pytest.fixture
    def search(self):
        return Refine(least_gain=0.0)


class TestGenetic(SearchContract):
    @pytest.fixture
    def search(self):
        return Genetic(population=8)


class TestNsga2(SearchContract):
    @pytest.fixture
    def search(self):
        return Nsga2(population=8)


@pytest.mark.parametrize("sampler", ["tpe", "nsga3", "cmaes"])
class TestOptuna(SearchContract):
    @pytest.fixture
    def search(self, sampler):
        if sampler == "cmaes":
            pytest.importorskip("cmaes")
        return OptunaSearch(sampler)


class TestSweep(SearchContract):
    @pytest.fixture
    def search(self):
        return Sweep(points=4)
