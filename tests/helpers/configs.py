"""Configs changed by hand, as a user might write them."""

from __future__ import annotations

from dataclasses import replace

from mpq.quantizers import Scheme


def with_scheme(config, name, scheme):
    """The config with another scheme in one layer."""
    return replace(config, layers={**config.layers, name: replace(config[name], scheme=Scheme.parse(scheme))})
