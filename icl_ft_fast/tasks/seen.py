"""A set of texts that grows on disk, so that a file of any length can be told from its repeats in constant memory."""

from __future__ import annotations

import sqlite3
from hashlib import blake2b


class Seen:
    """Texts met so far, as digests of 128 bits in a temporary SQLite database, which is gone when closed."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, text: str) -> bool:
        """Add a text; returns whether it is new."""
        digest = blake2b(text.encode(), digest_size=16).digest()
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1

    def close(self) -> None:
        """Forget everything."""
        self._database.close()
