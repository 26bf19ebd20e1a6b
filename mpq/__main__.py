"""``python -m mpq``."""

from mpq.cli import main

main()
