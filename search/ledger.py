"""Evaluation ledger: every measured loss in one SQLite file, kept at once, found again by its content."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from mpq.errors import MpqError
from mpq.problem import Floats, Ints

_SCHEMA = """
CREATE TABLE IF NOT EXISTS contexts (key TEXT PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS evaluations (
    context TEXT NOT NULL, pick TEXT NOT NULL, loss REAL NOT NULL, PRIMARY KEY (context, pick)
);
CREATE TABLE IF NOT EXISTS parts (
    context TEXT NOT NULL, pick TEXT NOT NULL, part INTEGER NOT NULL, loss REAL NOT NULL,
    PRIMARY KEY (context, pick, part)
);
CREATE TABLE IF NOT EXISTS claims (
    context TEXT NOT NULL, pick TEXT NOT NULL, owner TEXT NOT NULL, PRIMARY KEY (context, pick)
);
"""
_TABLES = {"contexts", "evaluations"}  # of every version; while another process makes the file, one may be missing
_PATIENCE = 60.0  # seconds to wait for another process that writes


class Ledger:
    """Measured losses of picks, which a killed search finds again and several processes may share.

    An evaluation is found by its context and its pick. The context is a text that names all that a loss depends on
    besides the pick: model, data, schemes. If any of them changes, the old evaluations are not found. Each evaluation
    is committed on its own, so a process that is killed loses at most the one it was measuring.

    Args:
        path: SQLite file, made if it is missing; None keeps the evaluations in memory only.
        context: See above.

    Raises:
        MpqError: If the file is not a ledger or can't be opened.

    Example:
        >>> ledger = Ledger(context="resnet20")
        >>> ledger.put([0, 3, 1], 0.25)
        >>> ledger.get([0, 3, 1]), ledger.get([1, 1, 1]), len(ledger)
        (0.25, None, 1)
    """

    def __init__(self, path: str | Path | None = None, context: str = "") -> None:
        self.path, self.context = path, context
        self._key = hashlib.sha256(context.encode()).hexdigest()
        try:
            self._base = sqlite3.connect(":memory:" if path is None else path, timeout=_PATIENCE)
            tables = {name for (name,) in self._base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables and tables.isdisjoint(_TABLES):
                raise sqlite3.DatabaseError("it is a database of something else")
            with self._base:
                self._base.executescript(_SCHEMA)
                self._base.execute("INSERT OR IGNORE INTO contexts VALUES (?, ?)", (self._key, context))
        except sqlite3.Error as error:
            raise MpqError(f"{path} can't be used as a ledger: {error}; give the path of a new file") from None

    def get(self, pick: ArrayLike) -> float | None:
        """The measured loss of a pick ``[G]``, or None."""
        query = "SELECT loss FROM evaluations WHERE context = ? AND pick = ?"
        row = self._base.execute(query, (self._key, _text(pick))).fetchone()
        return None if row is None else float(row[0])

    def put(self, pick: ArrayLike, loss: float) -> None:
        """Keep the measured loss of a pick ``[G]``; one that is there already stays."""
        with self._base:
            row = (self._key, _text(pick), float(loss))
            self._base.execute("INSERT OR IGNORE INTO evaluations VALUES (?, ?, ?)", row)

    def parts(self, pick: ArrayLike) -> list[float]:
        """The losses of a pick ``[G]`` on the first part of the data, on the first two, and so on, as far as kept."""
        query = "SELECT loss FROM parts WHERE context = ? AND pick = ? ORDER BY part"
        return [float(loss) for (loss,) in self._base.execute(query, (self._key, _text(pick)))]

    def put_parts(self, pick: ArrayLike, losses: list[float]) -> None:
        """Keep the losses of a pick ``[G]`` on parts of the data; those that are there already stay."""
        with self._base:
            rows = [(self._key, _text(pick), part, float(loss)) for part, loss in enumerate(losses)]
            self._base.executemany("INSERT OR IGNORE INTO parts VALUES (?, ?, ?, ?)", rows)

    def claim(self, pick: ArrayLike, owner: str, instead_of: str = "") -> str:
        """Claim the measurement of a pick ``[G]``; of several processes, only the first gets it.

        Args:
            pick: What is to be measured.
            owner: Who claims it.
            instead_of: An owner who is dead and whose claim is taken over.

        Returns:
            Whose claim it is now.
        """
        key = (self._key, _text(pick))
        with self._base:
            self._base.execute("INSERT OR IGNORE INTO claims VALUES (?, ?, ?)", (*key, owner))
            query = "UPDATE claims SET owner = ? WHERE context = ? AND pick = ? AND owner = ?"
            self._base.execute(query, (owner, *key, instead_of))
            return str(self._base.execute("SELECT owner FROM claims WHERE context = ? AND pick = ?", key).fetchone()[0])

    def all(self) -> tuple[Ints, Floats]:
        """Picks ``[N, G]`` and losses ``[N]`` of this context, in the order in which they were kept."""
        query = "SELECT pick, loss FROM evaluations WHERE context = ? ORDER BY rowid"
        rows = self._base.execute(query, (self._key,)).fetchall()
        picks = [[int(s) for s in text.split(",")] for text, _ in rows]
        groups = len(picks[0]) if picks else 0
        return np.array(picks, np.int64).reshape(len(picks), groups), np.array([x for _, x in rows], np.float64)

    def contexts(self) -> tuple[str, ...]:
        """All contexts in the file, such as earlier studies of other models."""
        return tuple(text for (text,) in self._base.execute("SELECT text FROM contexts ORDER BY rowid"))

    def __len__(self) -> int:
        query = "SELECT COUNT(*) FROM evaluations WHERE context = ?"
        return int(self._base.execute(query, (self._key,)).fetchone()[0])

    def close(self) -> None:
        """Close the file; ``with Ledger(...) as ledger`` does so too."""
        self._base.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _text(pick: ArrayLike) -> str:
    return ",".join(map(str, np.asarray(pick, np.int64).tolist()))
