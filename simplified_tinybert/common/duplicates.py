"""Find duplicates among millions of keys in little memory."""
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from simplified_tinybert.common.files import Problems, shorten


class DuplicateFinder:
    """Stores 8 bytes for each key: a first pass compares hashes, a second pass only keys whose hash is repeated."""

    def __init__(self):
        self._hashes = array("q")

    def add(self, key: object) -> None:
        self._hashes.append(hash(key))

    def repeated_hashes(self) -> set[int]:
        hashes = np.sort(np.frombuffer(self._hashes, dtype=np.int64))
        return set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())

    def report(self, keys: Iterator[tuple[int, object]], path: Path, name: str, problems: Problems) -> None:
        """Add a problem for each duplicate among `keys`: the same keys as before, as (line number, key)."""
        repeated, first_lines = self.repeated_hashes(), {}
        if not repeated:
            return
        for number, key in keys:
            if key in first_lines:
                shown = shorten(key if isinstance(key, str) else " ".join(key))
                problems.add(f"{path}:{number}: {name} {shown} is a duplicate of line {first_lines[key]}; remove one")
            elif hash(key) in repeated:
                first_lines[key] = number
