"""Keys that occur more than once, among millions, in little memory."""
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from simplified_tinybert.common.files import Problems, shorten


class DuplicateFinder:
    """Finds repeated keys among millions with 8 bytes each: hashes first, the keys themselves only on suspicion."""

    def __init__(self):
        self._hashes = array("q")

    def add(self, key: object) -> None:
        self._hashes.append(hash(key))

    def suspects(self) -> set[int]:
        """Hashes that occur more than once: no key is a duplicate if this is empty."""
        hashes = np.sort(np.frombuffer(self._hashes, dtype=np.int64))
        return set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())

    def report(self, keys: Iterator[tuple[int, object]], path: Path, what: str, problems: Problems) -> None:
        """Go through (line number, key) once more and add a problem for each key that was seen before."""
        suspects, first_seen = self.suspects(), {}
        if not suspects:
            return
        for number, key in keys:
            if hash(key) not in suspects:
                continue
            if key in first_seen:
                shown = shorten(key if isinstance(key, str) else " ".join(key))
                problems.add(f"{path}:{number}: {what} {shown} stands already in line {first_seen[key]}; "
                             f"each may occur once")
            else:
                first_seen[key] = number
