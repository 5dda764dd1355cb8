"""What could not be used, query by query and document by document: nothing is dropped in silence."""
from contextlib import ExitStack
from pathlib import Path

from simplified_tinybert.common.files import atomic_writer, warn

SHOWN = 5


class LeftOut:
    """Writes kind <tab> query_id <tab> document_id lines to a file, which only appears if there is one, and counts.

    The file is complete when `stack` is closed, and removed if that is because of an exception.
    """

    def __init__(self, path: Path, stack: ExitStack):
        self.path, self.stack, self.handle = path, stack, None
        self.counts: dict[str, int] = {}
        self.first: dict[str, list[str]] = {}

    def add(self, kind: str, query_id: str, document_id: str = "") -> None:
        if not self.handle:
            self.handle = self.stack.enter_context(atomic_writer(self.path))
        self.handle.write(f"{kind}\t{query_id}\t{document_id}\n")
        self.counts[kind] = self.counts.get(kind, 0) + 1
        first = self.first.setdefault(kind, [])
        if len(first) < SHOWN:
            first.append(f"{query_id} {document_id}".strip())

    def tell(self) -> None:
        """Say what was counted, with the first few of each kind."""
        for kind, count in self.counts.items():
            more = ", ..." if count > SHOWN else ""
            warn(f"{count:,} left out as {kind}: {', '.join(self.first[kind])}{more}")

    def finish(self) -> None:
        """Say where the list is; the list of an earlier run, if there is nothing now, goes with what it belonged to."""
        if self.counts:
            warn(f"all of them are listed in {self.path}")
        else:
            self.path.unlink(missing_ok=True)
