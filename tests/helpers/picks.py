"""Picks of problems small enough to try all."""

import itertools

import numpy as np


def every_pick(problem):
    """All allowed picks ``[n, G]``."""
    return np.array(list(itertools.product(*(np.flatnonzero(row) for row in problem.allowed))))
