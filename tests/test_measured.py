import pytest

from mpq.search import RandomSearch, Refine
from mpq.testing_search import SearchContract


class TestRandomSearch(SearchContract):
    @pytest.fixture
    def search(self):
        return RandomSearch()


class TestRefine(SearchContract):
    @pytest.fixture
    def search(self):
        return Refine(least_gain=0.0)
