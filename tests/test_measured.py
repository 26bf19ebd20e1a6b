"""The contract of searches that measure, for each of them; Quantune, CQAP and LINAS have files of their own."""

import pytest

from mpq.search import SEARCHES, Genetic, Nsga2, OptunaSearch, RandomSearch, Refine, Sweep
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


def test_searches_are_listed_under_their_own_names():
    assert {name: search.name for name, search in SEARCHES.items()} == {name: name for name in SEARCHES}
