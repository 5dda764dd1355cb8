"""A collection from the ir_datasets package (https://ir-datasets.com)."""
import argparse
import difflib
from collections.abc import Iterator
from contextlib import contextmanager

from simplified_tinybert.common.files import Problems, UserError, reason, shorten
from simplified_tinybert.data.collection import FLAGS, Documents, Row, query_id_error
from simplified_tinybert.data.documents import Document
from simplified_tinybert.ranking.trec import parse_grade, parse_score


def open_dataset(args: argparse.Namespace, problems: Problems) -> Documents | None:
    """Open --dataset. Add a problem if it is unknown, or for each part that neither it nor a file supplies."""
    parts = {"docs": args.docs, "queries": args.queries, "scoreddocs": args.candidates}
    parts |= {"qrels": args.qrels} if args.set_name == "train" else {}
    dataset, missing = None, [part for part, path in parts.items() if path is None]
    if not args.dataset:
        for part in missing:
            problems.add(f"{FLAGS[part]}: add this flag, or --dataset with a dataset that has {part}")
        return None
    with problems.collect():
        dataset = Dataset(args.dataset)
        for part in missing:
            if not dataset.dataset.has(part):
                problems.add(f"--dataset {args.dataset}: has no {part}; name a file with {FLAGS[part]}")
    return dataset


class Dataset:
    """A dataset by its id. ir_datasets downloads missing files if their licences allow it."""

    def __init__(self, name: str):
        import ir_datasets  # optional, and slow to import
        self.name, self.store = name, None
        try:
            self.dataset = ir_datasets.load(name)
        except KeyError as error:
            known = list(ir_datasets.registry)
            similar = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
            similar += [other for other in known if name in other and other not in similar][:5]
            raise UserError(f"--dataset {name}: no such ir_datasets id; did you mean "
                            f"{' or '.join(similar) or 'another one'}? All ids: https://ir-datasets.com") from error

    def queries(self, problems: Problems) -> dict[str, str]:
        queries = {}
        for query in self._read("queries_iter"):
            with self._name_in_errors():
                text = text_of(query)
            if text is None:
                problems.add(f"--dataset {self.name}: its queries have neither text nor default_text, only "
                             f"{fields_of(query)}; name a file with --queries")
                return {}
            if error := query_id_error(query.query_id):
                problems.add(f"--dataset {self.name}: {error}")
            queries[query.query_id] = text
        return queries

    def grades(self, problems: Problems) -> dict[str, dict[str, int]]:
        """Return grades by query and document. If a document has several judgements, the highest grade counts."""
        grades = {}
        for judgement in self._read("qrels_iter"):
            if not hasattr(judgement, "relevance"):
                problems.add(f"--dataset {self.name}: its judgements have no relevance, only {fields_of(judgement)}; "
                             f"name a file with --qrels")
                return {}
            try:
                grade = parse_grade(str(judgement.relevance))
            except ValueError as error:
                problems.add(f"--dataset {self.name}: query {shorten(judgement.query_id)}, document "
                             f"{shorten(judgement.doc_id)}: {error}")
                continue
            query_grades = grades.setdefault(judgement.query_id, {})
            query_grades[judgement.doc_id] = max(grade, query_grades.get(judgement.doc_id, grade))
        return grades

    def candidates(self) -> Iterator[Row]:
        """Yield all candidates. Invalid scores become NaN, which `by_query` reports."""
        for number, row in enumerate(self._read("scoreddocs_iter"), start=1):
            yield number, row.query_id, row.doc_id, parse_score(str(getattr(row, "score", None))), ""

    def get(self, document_id: str) -> Document | None:
        with self._name_in_errors():
            self.store = self.store or self.dataset.docs_store()
            try:
                found = self.store.get(document_id)
            except KeyError:
                return None
            return to_document(found)

    def _read(self, name: str) -> Iterator:
        with self._name_in_errors():
            yield from getattr(self.dataset, name)()

    @contextmanager
    def _name_in_errors(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"--dataset {self.name}: {error}") from error
        except Exception as error:                      # downloading and parsing can raise almost any exception
            raise UserError(f"--dataset {self.name}: cannot be fetched or read ({shorten(reason(error), 300)}); for "
                            f"details run: ir_datasets export {self.name} docs | head") from error


def to_document(document: object) -> Document:
    """Return the title, and the body or text, of an ir_datasets document. Without these, return its default text."""
    for name in ("body", "text"):
        if isinstance(body := getattr(document, name, None), str):
            title = getattr(document, "title", None)
            return Document(clean(title) if isinstance(title, str) else "", clean(body))
    text = text_of(document)
    if text is None:
        texts = [value for value in document[1:] if isinstance(value, str)]
        if not texts:
            raise UserError(f"document {shorten(document.doc_id)} has no text, only {fields_of(document)}; name a file "
                            f"with --docs")
        text = clean(" ".join(texts))
    return Document("", text)


def text_of(record: object) -> str | None:
    """Return the text of a query or document, or None if its type has no text field."""
    if not (hasattr(record, "default_text") or hasattr(record, "text")):
        return None
    text = record.default_text() if hasattr(record, "default_text") else record.text
    return clean(text) if isinstance(text, str) else ""


def fields_of(record: object) -> str:
    return ", ".join(getattr(record, "_fields", vars(type(record))))


def clean(text: str) -> str:
    """Reduce white space to single spaces and replace characters that UTF-8 cannot encode."""
    return " ".join(text.split()).encode("utf-8", "replace").decode("utf-8")
