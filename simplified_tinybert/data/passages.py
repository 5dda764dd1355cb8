"""Documents cut into passages."""
from typing import NamedTuple

from simplified_tinybert.data.collection import Documents
from simplified_tinybert.data.documents import Document
from simplified_tinybert.data.left_out import LeftOut


class Cutting(NamedTuple):
    """How documents are cut: windows of `window` words, one every `stride` words, with the title in front or not.

    first: passages at the start of a document that are used, None: all.
    """
    window: int
    stride: int
    title: bool
    first: int | None = None


def window_starts(words: int, window: int, stride: int) -> range:
    """First word of each window over a text of `words` words: 0, stride, 2 * stride ... until one reaches the end."""
    behind = max(0, words - window)                                     # words that the first window does not reach
    return range(0, -(-behind // stride) * stride + 1, stride)


def cut(document: Document, cutting: Cutting) -> list[str]:
    """The passages of a document, words joined by single blanks; none if it has no words.

    Words are what str.split() finds, so that no passage holds a tab or a line end. The window counts words of the body;
    with the title in front a document without a body is one passage, its title.
    """
    words, title = document.body.split(), document.title.split() if cutting.title else []
    if not words and not title:
        return []
    return [" ".join(title + words[start:start + cutting.window])
            for start in window_starts(len(words), cutting.window, cutting.stride)[:cutting.first]]


def passages_of(documents: Documents, cutting: Cutting, left_out: LeftOut, query_id: str,
                document_id: str) -> list[str]:
    """The passages of a document that a query needs; none, which is noted, if it is missing or has no text."""
    document = documents.get(document_id)
    passages = cut(document, cutting) if document else []
    if not passages:
        left_out.add("empty_document" if document else "missing_document", query_id, document_id)
    return passages
