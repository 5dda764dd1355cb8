"""A dataset of the ir_datasets package (https://ir-datasets.com) as documents, queries, judgements and candidates."""
import argparse
import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager

from simplified_tinybert.common.files import Problems, UserError, reason, shorten
from simplified_tinybert.data.collection import FLAGS, Documents, Row, wrong_query_id
from simplified_tinybert.data.documents import Document
from simplified_tinybert.ranking.trec import parse_grade, parse_score


def open_dataset(args: argparse.Namespace, problems: Problems) -> Documents | None:
    """The dataset of --dataset, if it is there and has all parts for which no file is given."""
    parts = {"docs": args.docs, "queries": args.queries, "scoreddocs": args.candidates}
    parts |= {"qrels": args.qrels} if args.set_name == "train" else {}
    if args.dataset:
        try:
            dataset = Dataset(args.dataset)
            dataset.check_parts([part for part, path in parts.items() if path is None])
            return dataset
        except UserError as error:
            problems.add(str(error))
    else:
        for part, path in parts.items():
            if path is None:
                problems.add(f"{FLAGS[part]} is needed, or --dataset with a dataset that has {part}")
    return None


class Dataset:
    """A dataset by its id. What is not on this machine yet is downloaded by the package, as far as its licence allows.
    """

    def __init__(self, name: str):
        import ir_datasets  # here, for only some need the package, and it is slow to import
        self.name, self.store = name, None
        try:
            self.dataset = ir_datasets.load(name)
        except KeyError as error:
            known = list(ir_datasets.registry)
            near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
            near += [other for other in known if name in other and other not in near][:5]
            raise UserError(f"--dataset {name}: ir_datasets knows none of this name; near to it: "
                            f"{', '.join(near) or 'none'}; all of them: https://ir-datasets.com") from error

    def check_parts(self, parts: list[str]) -> None:
        """Raise UserError unless the dataset has these parts."""
        lacking = [part for part in parts if not self.dataset.has(part)]
        if lacking:
            raise UserError("\n".join(f"--dataset {self.name}: has no {part}; give a file by {FLAGS[part]}"
                                      for part in lacking))

    def queries(self, problems: Problems) -> dict[str, str]:
        queries = {}
        for query in self._read("queries_iter"):
            with self._told():
                text = text_of(query)
            if text is None:
                problems.add(f"--dataset {self.name}: its queries have neither text nor default_text, but "
                             f"{fields_of(query)}; choose among them and give a file by --queries")
                return {}
            if complaint := wrong_query_id(query.query_id):
                problems.add(f"--dataset {self.name}: {complaint}")
            queries[query.query_id] = text
        return queries

    def grades(self, problems: Problems) -> dict[str, dict[str, int]]:
        """Grades by query and document; of several judgements of a document, for its parts, the highest."""
        grades = {}
        for judgement in self._read("qrels_iter"):
            if not hasattr(judgement, "relevance"):
                problems.add(f"--dataset {self.name}: its judgements have no relevance, but {fields_of(judgement)}; "
                             f"give a file by --qrels")
                return {}
            try:
                grade = parse_grade(str(judgement.relevance))
            except ValueError as error:
                problems.add(f"--dataset {self.name}: query {shorten(judgement.query_id)}, document "
                             f"{shorten(judgement.doc_id)}: {error}")
                continue
            of_query = grades.setdefault(judgement.query_id, {})
            of_query[judgement.doc_id] = max(grade, of_query.get(judgement.doc_id, grade))
        return grades

    def candidates(self) -> Iterator[Row]:
        """A score that is not a finite number becomes NaN, of which `by_query` complains."""
        for number, row in enumerate(self._read("scoreddocs_iter"), start=1):
            score = parse_score(str(getattr(row, "score", None)))
            yield number, row.query_id, row.doc_id, math.nan if score is None else score

    def get(self, document_id: str) -> Document | None:
        """The document, or None if the dataset has none of this id."""
        with self._told():
            self.store = self.store or self.dataset.docs_store()
            try:
                found = self.store.get(document_id)
            except KeyError:
                return None
            return parts_of(found)

    def _read(self, name: str) -> Iterator:
        with self._told():
            rows = iter(getattr(self.dataset, name)())
        while True:
            with self._told():
                row = next(rows, None)
            if row is None:
                return
            yield row

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"--dataset {self.name}: {error}") from error
        except Exception as error:                      # a download or a file that fails: it can raise almost anything
            raise UserError(f"--dataset {self.name}: cannot be fetched or read ({shorten(reason(error), 300)}); "
                            f"ir_datasets tells more: ir_datasets export {self.name} docs | head") from error


def parts_of(document: object) -> Document:
    """Title, if it has one, and body or text; of documents made otherwise all of the text that the package gives."""
    for name in ("body", "text"):
        if isinstance(body := getattr(document, name, None), str):
            title = getattr(document, "title", None)
            return Document(clean(title) if isinstance(title, str) else "", clean(body))
    text = text_of(document)
    if text is None:
        texts = [value for value in document[1:] if isinstance(value, str)]
        if not texts:
            raise UserError(f"document {shorten(document.doc_id)} has no text, but {fields_of(document)}; give a file "
                            f"by --docs")
        text = clean(" ".join(texts))
    return Document("", text)


def text_of(part: object) -> str | None:
    """The one text of a query or a document, or None if its kind has none."""
    if not (hasattr(part, "default_text") or hasattr(part, "text")):
        return None
    text = part.default_text() if hasattr(part, "default_text") else part.text
    return clean(text) if isinstance(text, str) else ""


def fields_of(part: object) -> str:
    return ", ".join(getattr(part, "_fields", vars(type(part))))


def clean(text: str) -> str:
    """The text with single blanks for all white space, as UTF-8 can hold it."""
    return " ".join(text.split()).encode("utf-8", "replace").decode("utf-8")
