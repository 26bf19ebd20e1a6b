"""DSPs: long vectors and matrix units over a small memory that software fills.

The vector unit multiplies bytes or half words; 4-bit weights gain where the device keeps them packed up to the kernel
(`packed_ops`), every other pair is promoted to one that it has (``runs_as``). A layer works out of the innermost memory
(VTCM on Hexagon): inputs and outputs that fit there stay between layers; what does not is streamed from the outermost,
and where weights and inputs don't fit together, one of them passes several times.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpq.cost_models.devices import Device
from mpq.cost_models.latency import LayerTimes
from mpq.cost_models.roofline import Shapes, Tensors, vector_times
from mpq.cost_models.workload import Workload
from mpq.problem import Floats
from mpq.quantizers import Scheme


def layer_times(work: Workload, schemes: Sequence[Scheme], device: Device) -> LayerTimes:
    """Seconds of each layer under each scheme on a DSP, each part ``[L, S]``.

    Raises:
        FormatError: If the profile has no curve or no peak for a kernel.
    """
    return vector_times(work, schemes, device, _through_scratchpad)


def _through_scratchpad(shapes: Shapes, moved: Tensors, device: Device) -> Floats:
    """Streaming and working memory at once: the slower of the two decides.

    Half of the innermost memory holds what stays while the other half is filled. Weights stay in pieces while the
    inputs pass once per piece, or the other way round, whichever moves fewer bytes.
    """
    near, far = device.memory[0], device.memory[-1]
    half = near.size_bytes / 2
    fits = moved.inputs + moved.outputs <= half
    weights, inputs = moved.weights, moved.inputs
    passes = np.minimum(weights + inputs * np.ceil(weights / half), weights * np.ceil(inputs / half) + inputs)
    streamed = np.where(fits, weights, passes + moved.outputs)
    return np.maximum(streamed / far.bandwidth, (weights + inputs + moved.outputs) / near.bandwidth)
