"""CPUs: vector and tile instructions, caches, packing and requantization.

Which instruction does the products decides the time, not the stored bits: there is no 4-bit multiply-accumulate in
VNNI, AMX, SDOT or I8MM, so int4 and int2 weights run as int8 (``runs_as`` of the kernel) and gain only where reading
the weights is what a layer waits for (one token, one image through a wide layer). Tensors come from the innermost
level of memory that holds all of the layer's at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpq.cost_models.devices import Device
from mpq.cost_models.latency import LayerTimes
from mpq.cost_models.roofline import Shapes, Tensors, vector_times
from mpq.cost_models.workload import Workload
from mpq.errors import FormatError
from mpq.problem import Floats
from mpq.quantizers import Scheme


def layer_times(work: Workload, schemes: Sequence[Scheme], device: Device) -> LayerTimes:
    """Seconds of each layer under each scheme on a CPU, each part ``[L, S]``.

    Raises:
        FormatError: If the profile has no curve or no peak for a kernel, or names a memory that it has not.
    """
    return vector_times(work, schemes, device, _through_caches)


def _through_caches(shapes: Shapes, moved: Tensors, device: Device) -> Floats:
    """Everything once, from the level that holds it; weights from the level that the profile names."""
    activations = moved.inputs + moved.outputs
    source = device.figures.get("weights_from")
    if source is None:
        held = moved.weights + activations
        return held / bandwidth_of(held, device)
    rates = {m.name: m.bandwidth for m in device.memory}
    if source not in rates:
        raise FormatError(f"{device.name}: figures.weights_from: {source!r} is none of its memory: {', '.join(rates)}")
    return moved.weights / rates[source] + activations / bandwidth_of(activations, device)


def bandwidth_of(held: Floats, device: Device) -> Floats:
    """Bytes per second of the innermost level of memory that holds so many bytes ``[L]``."""
    sizes = np.array([m.size_bytes for m in device.memory[:-1]])
    return np.array([m.bandwidth for m in device.memory])[np.searchsorted(sizes, held)]
