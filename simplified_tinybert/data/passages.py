"""Documents cut into passages, and a list of what could not be used: nothing is dropped in silence."""
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from simplified_tinybert.common.files import atomic_writer, warn
from simplified_tinybert.data.collection import Documents
from simplified_tinybert.data.documents import Document

SHOWN = 5           # of what was left out, of each kind


class SkippedLog:
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


class PassageWindow(NamedTuple):
    """How a document is cut into passages: windows of `words` words, one every `stride` words."""
    words: int
    stride: int
    title: bool                                                         # put the title before each passage
    first: int | None = None                                            # use the first passages only; None: all


def window_starts(words: int, window: int, stride: int) -> range:
    """First word of each window over a text of `words` words: 0, stride, 2 * stride ... until one reaches the end."""
    behind = max(0, words - window)                                     # words that the first window does not reach
    return range(0, -(-behind // stride) * stride + 1, stride)


def cut(document: Document, window: PassageWindow) -> list[str]:
    """The passages of a document, words joined by single blanks; none if it has no words.

    Words are what str.split() finds, so that no passage holds a tab or a line end. The window counts words of the body;
    with the title in front a document without a body is one passage, its title.
    """
    words, title = document.body.split(), document.title.split() if window.title else []
    if not words and not title:
        return []
    return [" ".join(title + words[start:start + window.words])
            for start in window_starts(len(words), window.words, window.stride)[:window.first]]


class PassageSource(NamedTuple):
    """Looks up documents and cuts them into passages."""
    documents: Documents
    window: PassageWindow
    skipped: SkippedLog

    def get(self, query_id: str, document_id: str) -> list[str]:
        """The passages of a document for a query. A document that is missing or has no text is logged: []."""
        document = self.documents.get(document_id)
        passages = cut(document, self.window) if document else []
        if not passages:
            self.skipped.add("empty_document" if document else "missing_document", query_id, document_id)
        return passages
