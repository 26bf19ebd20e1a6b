import pytest

from mpq.search import RandomSearch
from mpq.testing_search import SearchContract


class TestRandomSearch(SearchContract):
    @pytest.fixture
    def search(self):
        return RandomSearch()
