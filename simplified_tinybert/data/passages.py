"""Split documents into passages, and log every query and document that is skipped."""
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from simplified_tinybert.common.files import atomic_writer, warn
from simplified_tinybert.data.collection import Documents
from simplified_tinybert.data.documents import Document

LISTED = 5          # examples of each kind on stderr


class SkippedLog:
    """Counts skipped queries and documents and writes kind <tab> query_id <tab> document_id lines to a file.

    The first line creates the file. Closing `stack` completes it; if an exception closes `stack`, it is removed.
    Without a path, lines are only counted.
    """

    def __init__(self, path: Path | None, stack: ExitStack):
        self.path, self.stack, self.handle = path, stack, None
        self.counts: dict[str, int] = {}
        self.first: dict[str, list[str]] = {}

    def add(self, kind: str, query_id: str, document_id: str = "") -> None:
        if self.path:
            self.handle = self.handle or self.stack.enter_context(atomic_writer(self.path))
            self.handle.write(f"{kind}\t{query_id}\t{document_id}\n")
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] <= LISTED:
            self.first.setdefault(kind, []).append(f"{query_id} {document_id}".strip())

    def print_counts(self) -> None:
        for kind, count in self.counts.items():
            more = ", ..." if count > LISTED else ""
            warn(f"skipped {count:,} ({kind}): {', '.join(self.first[kind])}{more}")

    def finish(self) -> None:
        """Print the path of the log; if nothing was skipped, remove the log of an earlier run."""
        if self.counts:
            warn(f"all skipped queries and documents are listed in {self.path}")
        else:
            self.path.unlink(missing_ok=True)


class PassageWindow(NamedTuple):
    """Passages are windows of `words` words; one starts every `stride` words."""
    words: int
    stride: int
    title: bool                                                         # prepend the title to each passage
    first: int | None = None                                            # number of passages; None: all


def window_starts(words: int, window: int, stride: int) -> range:
    """Return the starts of windows over a text of `words` words: 0, stride, 2 * stride ... until the end is covered."""
    remaining = max(0, words - window)                                  # words after the first window
    return range(0, -(-remaining // stride) * stride + 1, stride)


def split_document(document: Document, window: PassageWindow) -> list[str]:
    """Return the passages of a document: words of str.split() joined by single spaces; none if it has no words.

    Only words of the body count. If titles are prepended, a document without a body is one passage, its title.
    """
    words, title = document.body.split(), document.title.split() if window.title else []
    if not words and not title:
        return []
    return [" ".join(title + words[start:start + window.words])
            for start in window_starts(len(words), window.words, window.stride)[:window.first]]


class PassageSource(NamedTuple):
    """Looks up documents and splits them into passages."""
    documents: Documents
    window: PassageWindow
    skipped: SkippedLog

    def get(self, query_id: str, document_id: str) -> list[str]:
        """Return the passages of a document. Missing and empty documents are logged and have no passages."""
        document = self.documents.get(document_id)
        passages = split_document(document, self.window) if document else []
        if not passages:
            self.skipped.add("empty_document" if document else "missing_document", query_id, document_id)
        return passages
