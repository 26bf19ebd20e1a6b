"""Cost models: what each scheme of each group costs, from shapes and formats alone.

A cost model is a function ``(SearchSpace) -> Cost``; a new one is one file here plus one line in `COST_MODELS`.
A device is a JSON file in this folder.
"""

from typing import TYPE_CHECKING

from mpq._lazy import lazy_names

if TYPE_CHECKING:
    from mpq.cost_models.devices import Device, all_devices, find_device
    from mpq.cost_models.friendliness import Friendliness, quantization_friendliness
    from mpq.cost_models.kv_cache import KvCache, find_kv_cache
    from mpq.cost_models.registry import COST_MODELS, CostModel, default_costs
    from mpq.cost_models.table import Cost

__all__ = [
    "COST_MODELS",
    "Cost",
    "CostModel",
    "Device",
    "Friendliness",
    "KvCache",
    "all_devices",
    "default_costs",
    "find_device",
    "find_kv_cache",
    "quantization_friendliness",
]

# Cost models read search spaces, which know devices: names are looked up on use, so neither imports the other first.
__getattr__ = lazy_names(
    __name__,
    dict.fromkeys(("Device", "all_devices", "find_device"), "mpq.cost_models.devices")
    | dict.fromkeys(("COST_MODELS", "CostModel", "default_costs"), "mpq.cost_models.registry")
    | dict.fromkeys(("Friendliness", "quantization_friendliness"), "mpq.cost_models.friendliness")
    | dict.fromkeys(("KvCache", "find_kv_cache"), "mpq.cost_models.kv_cache")
    | {"Cost": "mpq.cost_models.table"},
)
