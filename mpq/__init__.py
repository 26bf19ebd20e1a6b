"""mpq: mixed-precision bit allocation for trained PyTorch networks."""

__version__ = "0.1.0"
