"""All cost models by the name that budgets use."""

from typing import Protocol

from mpq.cost_models.bit_ops import bit_ops
from mpq.cost_models.size import avg_bits, size, stored_bits
from mpq.cost_models.table import Cost
from mpq.space import SearchSpace


class CostModel(Protocol):
    """What every cost model is."""

    def __call__(self, space: SearchSpace, /) -> Cost:
        """Cost of each scheme of each group."""


COST_MODELS: dict[str, CostModel] = {
    "size": size,
    "avg_bits": avg_bits,
    "stored_bits": stored_bits,
    "bitops": bit_ops,
}
