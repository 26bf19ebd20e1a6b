"""What was measured once, for another device: other schemes have kernels, and everything costs something else."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mpq.cost_models import Device, default_costs, find_device, quantization_friendliness
from mpq.errors import FormatError
from mpq.sensitivity import SensitivityTable
from mpq.space import SearchSpace

if TYPE_CHECKING:
    from mpq.analysis import Analysis


def retarget(analysis: Analysis, device: str | Device, drop_useless: bool) -> Analysis:
    """See `Analysis.on`.

    Raises:
        FormatError: If there is no such device, or a group has no scheme with a kernel there.
        BudgetError: If useless schemes are to be dropped and the device has no figures for time.
    """
    target, space = find_device(device), analysis.space
    columns = np.array([i for i, s in enumerate(space.schemes) if target.supports(s)], np.int64)
    allowed = space.allowed[:, columns]
    schemes = tuple(space.schemes[i] for i in columns)
    for group, row in zip(space.groups, allowed, strict=True):
        if not row.any():
            raise FormatError(
                f"layer {group.name!r} has no scheme with a kernel on {target.name}; it runs {target.kernel_names()}"
            )
    found = replace(space, schemes=schemes, allowed=allowed, device=target)
    if drop_useless:
        found = replace(found, allowed=_useful(found))
    table = _columns(analysis.table, columns)
    provenance = {**analysis.provenance, "device": target.name}
    return replace(analysis, space=found, table=table, costs=default_costs(found), provenance=provenance)


def _useful(space: SearchSpace) -> NDArray[np.bool_]:
    """The allowed schemes without those that are no faster than a wider allowed one in any layer of their group."""
    keep = space.allowed.copy()
    for row in np.unique(space.allowed, axis=0):
        columns = np.flatnonzero(row)
        found = quantization_friendliness(space.graph, space.device, [space.schemes[i] for i in columns])
        useless = dict(zip((x.name for x in found.layers), found.useless, strict=True))
        for g in np.flatnonzero((space.allowed == row).all(1)):
            keep[g, columns] = ~np.all([useless[x.name] for x in space.groups[g].layers], axis=0)
    return keep


def _columns(table: SensitivityTable, columns: NDArray[np.int64]) -> SensitivityTable:
    return replace(
        table,
        schemes=tuple(table.schemes[i] for i in columns),
        loss=table.loss[:, columns],
        stderr=table.stderr[:, columns],
        interactions=None if table.interactions is None else table.interactions[:, columns][..., columns],
        rows=None if table.rows is None else table.rows[..., columns],
    )
