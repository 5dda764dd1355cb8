"""From a raw collection to training examples or test pairs: documents cut into passages.

    python prepare_examples.py train --docs docs.tsv.gz --queries queries.train.tsv --qrels qrels.train.txt \\
        --candidates top100.train.txt --output train.tsv --title --filter_model nboost/pt-bert-base-uncased-msmarco
    python prepare_examples.py test --docs docs.tsv.gz --queries queries.test.tsv --candidates top100.test.txt \\
        --output pairs.tsv --title
    python prepare_examples.py test --dataset msmarco-document/trec-dl-2019 --output pairs.tsv --title

In, UTF-8, plain or gzip (--dataset: from the ir_datasets package; a file takes the place of the dataset's part):
    docs        document_id <tab> url <tab> title <tab> body, or document_id <tab> text
    queries     query_id <tab> query
    candidates  query_id Q0 document_id rank score run_tag (a TREC run, such as MS MARCO's top 100),
                or query_id document_id rank; the lines of a query stand together
    qrels       query_id 0 document_id grade
Out, in the order of the candidates' queries:
    train       index <tab> query <tab> passage <tab> label        label 1: relevant, 0: not
    test        query_id#document_id_n <tab> query <tab> passage   n = 0, 1, 2 ... within the document
OUTPUT.run.json tells what it was made of. What could not be used (a missing document, one without text, a query without
candidates ...) is counted on stderr and listed in OUTPUT.left_out.tsv: kind <tab> query_id <tab> document_id; of the
candidates that training draws from, those that were looked up.

Passages are windows over the words of the body, from word 0, stride, 2 * stride ... until one reaches the end, or
--first_passages of them.
test:  all passages of the candidates.
train: label 1, passages of the relevant documents: all of them, or since not every passage of a relevant document is
relevant, those that a ranker, --filter_model, scores highest. Label 0: passages drawn from candidates that are judged
not relevant or not at all (one judged relevant below --relevance_level is neither), spread over as many documents as
possible; no text that a relevant document has too. A query without a passage of either label is left out.

Documents stay on disk and are found by an index that is built once, in --cache_file_dir; a .gz file is unpacked there.
"""
import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from simplified_tinybert.common.files import (
    Problems,
    UserError,
    atomic_writer,
    check_input_file,
    check_output_files,
    run_main,
    say,
)
from simplified_tinybert.common.records import record_file, record_path
from simplified_tinybert.data.collection import Collection, count_candidates, open_collection
from simplified_tinybert.data.ir_dataset import open_dataset
from simplified_tinybert.data.passages import PassageSource, PassageWindow, SkippedLog
from simplified_tinybert.data.sampling import (
    Sampling,
    TrainingQuery,
    can_be_used,
    draw_queries,
    in_groups,
    negatives,
    positives,
    relevant_documents,
    training_queries,
)

if TYPE_CHECKING:
    from simplified_tinybert.data.passage_filter import PassageFilter

INPUTS = {"docs": "documents", "queries": "queries", "qrels": "judgements", "candidates": "candidates"}
TRAIN_ONLY = {"qrels": None, "relevance_level": 1, "negatives": 1.0, "max_queries": None, "positive_passages": None,
              "retrieved_positives": False, "seed": 42, "filter_model": None, "filter_threshold": None,
              "max_seq_length": 256, "device": "auto", "bf16": False}
FILTER_ONLY = ("filter_threshold", "max_seq_length", "device", "bf16")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("set_name", choices=("train", "test"), help="training examples, or pairs to re-rank")
    add("--docs", type=Path, help="documents, plain or .gz")
    add("--queries", type=Path, help="queries")
    add("--candidates", type=Path, help="candidate documents of each query")
    add("--dataset", metavar="ID", help="dataset of the ir_datasets package, for what no file is given")
    add("--output", type=Path, required=True, help="file to write")
    add("--window", type=int, default=150, help="most words of a passage, without the title (default: 150)")
    add("--stride", type=int, default=75, help="words from one passage's start to the next's (default: 75)")
    add("--title", action="store_true", help="put the document's title in front of each passage")
    add("--first_passages", type=int, metavar="N", help="use the first N passages of a document (default: all)")
    add("--depth", type=int, help="use the best so many candidates of each query (default: all that are given)")
    add("--cache_file_dir", type=Path, default=Path("cache"),
        help="directory for the index of the documents, and for the unpacked text of a .gz file (default: cache)")
    add = parser.add_argument_group("train only").add_argument
    add("--qrels", type=Path, help="judgements")
    add("--relevance_level", type=int, help="lowest grade that counts as relevant (default: 1)")
    add("--negatives", type=float, help="passages of label 0 for each of label 1, such as 2 or 0.5 (default: 1)")
    add("--positive_passages", type=int, metavar="N", help="most passages of a relevant document: drawn at random, or "
        "with --filter_model the best (default: all; 1 with --filter_model alone)")
    add("--retrieved_positives", action="store_true", default=None, help="use only those relevant documents that are "
        "candidates, as all are that re-ranking meets: where a first ranking misses most of them, the others would "
        "teach that relevant passages share few words with their query")
    add("--max_queries", type=int, help="use so many of the queries, drawn at random (default: all)")
    add("--seed", type=int, help="of all that is drawn at random (default: 42)")
    add("--filter_model", metavar="MODEL", help="ranker (directory or hub id) that chooses among the passages of a "
        "relevant document")
    add("--filter_threshold", type=float, metavar="P", help="keep passages to which it gives a probability of at least "
        "P (default: no bound)")
    add("--max_seq_length", type=int, help="tokens of a pair for the ranker (default: 256)")
    add("--device", help="of the ranker: auto, cpu, cuda, cuda:1, or a CUDA index such as 0 (default: auto)")
    add("--bf16", action="store_true", default=None, help="compute the ranker's scores in bfloat16")
    return parser.parse_args()


def side_files(output: Path) -> tuple[Path, Path]:
    """The list of what was left out, and the record."""
    return output.with_name(output.name + ".left_out.tsv"), record_path(output)


def check_args(args: argparse.Namespace, problems: Problems) -> None:
    """Complain of flags and files that cannot work, and fill in the defaults of training."""
    given = [name for name in TRAIN_ONLY if getattr(args, name) is not None]
    if args.set_name == "test":
        for name in given:
            problems.add(f"--{name}: is for train only; leave it out")
    elif not args.filter_model:
        for name in [name for name in given if name in FILTER_ONLY]:
            problems.add(f"--{name}: is for --filter_model, which is not given")
    for name in set(TRAIN_ONLY) - set(given):
        setattr(args, name, TRAIN_ONLY[name])
    if args.filter_model and args.positive_passages is None and args.filter_threshold is None:
        args.positive_passages = 1
    rules = [("window", args.window >= 1, "1 word or more"),
             ("stride", 1 <= args.stride <= max(1, args.window), "1 to the window, else words would be lost"),
             ("first_passages", args.first_passages is None or args.first_passages >= 1, "1 or more"),
             ("depth", args.depth is None or args.depth >= 1, "1 or more"),
             ("relevance_level", args.relevance_level >= 1, "1 or more"),
             ("negatives", 0 <= args.negatives < 1e6, "0 or more"),
             ("positive_passages", args.positive_passages is None or args.positive_passages >= 1, "1 or more"),
             ("max_queries", args.max_queries is None or args.max_queries >= 1, "1 or more"),
             ("filter_threshold", args.filter_threshold is None or 0 <= args.filter_threshold <= 1, "0 to 1")]
    for name, holds, expected in rules:
        if not holds:
            problems.add(f"--{name} {getattr(args, name)}: expected {expected}")
    paths = {path: what for name, what in INPUTS.items() if (path := getattr(args, name))}
    for path, what in paths.items():
        check_input_file(path, problems, what, read_twice=True)
    check_output_files([args.output, *side_files(args.output)], problems, inputs=paths)
    if args.cache_file_dir.exists() and not args.cache_file_dir.is_dir():
        problems.add(f"--cache_file_dir {args.cache_file_dir}: is a file; name a directory")


def open_filter(args: argparse.Namespace, problems: Problems) -> "PassageFilter | None":
    if not args.filter_model:
        return None
    from simplified_tinybert.data.passage_filter import PassageFilter  # here, because it takes seconds
    return PassageFilter(args.filter_model, args.max_seq_length, args.device, args.bf16, problems)


def test_lines(collection: Collection, passages: PassageSource, progress: tqdm) -> Iterator[str]:
    """The lines of all passages of all candidates."""
    for query_id, ranked in collection.candidates(Problems()):
        if text := collection.queries.get(query_id):
            for document_id in ranked:
                for number, passage in enumerate(passages.get(query_id, document_id)):
                    yield f"{query_id}#{document_id}_{number}\t{text}\t{passage}\n"
                progress.update()
        else:
            passages.skipped.add("query_without_text", query_id)
            progress.update(len(ranked))


def train_lines(queries: Iterable[TrainingQuery], sampling: Sampling, ranker: "PassageFilter | None",
                passages: PassageSource, counts: Counter) -> Iterator[str]:
    """The lines of the examples of all `queries`; `counts` tells what was found."""
    for group in in_groups(queries):
        for query, kept in zip(group, positives(group, sampling, ranker and ranker.probabilities, passages.skipped)):
            drawn, wanted = negatives(query, len(kept), sampling, passages)
            if not kept or wanted and not drawn:
                passages.skipped.add(f"query_without_{'negative' if kept else 'positive'}_passage", query.query_id)
                continue
            for label, texts in ((1, kept), (0, drawn)):
                for passage in texts:
                    index = counts["label 0"] + counts["label 1"]
                    yield f"{index}\t{query.text}\t{passage}\t{label}\n"
                    counts[f"label {label}"] += 1
            counts["queries"] += 1
            counts["queries short of label 0"] += len(drawn) < wanted


def note_absent_queries(collection: Collection, sizes: dict[str, int], level: int, skipped: SkippedLog) -> None:
    """Note the queries that the candidates, which are what is gone through, do not have."""
    for query_id in collection.queries:
        if query_id not in sizes:
            skipped.add("query_without_candidates", query_id)
    for query_id in collection.grades:
        known = query_id in sizes or query_id in collection.queries
        if not known and relevant_documents(collection, query_id, level):
            skipped.add("query_without_text", query_id)


def write_lines(args: argparse.Namespace, collection: Collection, sizes: dict[str, int],
                ranker: "PassageFilter | None", skipped: SkippedLog) -> Counter:
    """Write the output, line by line. Returns what was counted."""
    window = PassageWindow(args.window, args.stride, args.title, args.first_passages)
    passages, counts = PassageSource(collection.documents, window, skipped), Counter()
    if args.set_name == "train":
        usable = [query_id for query_id in sizes if can_be_used(collection, query_id, args.relevance_level)]
        chosen = set(usable) if args.max_queries is None else draw_queries(usable, args.max_queries, args.seed)
        sampling = Sampling(args.relevance_level, args.negatives, args.positive_passages,
                            args.filter_threshold or 0.0, args.retrieved_positives, args.seed)
        progress = tqdm(training_queries(collection, chosen, sampling, passages), total=len(chosen), desc="sampling",
                        unit=" queries", unit_scale=True)
        lines = train_lines(progress, sampling, ranker, passages, counts)
    else:
        progress = tqdm(total=sum(sizes.values()), desc="cutting", unit=" documents", unit_scale=True)
        lines = test_lines(collection, passages, progress)
    with progress, atomic_writer(args.output) as handle:
        for line in lines:
            handle.write(line)
            counts["lines"] += 1
        note_absent_queries(collection, sizes, args.relevance_level, skipped)
        progress.close()
        skipped.tell()
        if not counts["lines"]:
            raise UserError(f"{args.output}: is not written, for nothing could be made of these inputs, see above; do "
                            f"they belong together?")
    return counts


def main() -> None:
    args, problems = parse_args(), Problems()
    check_args(args, problems)
    dataset, ranker = open_dataset(args, problems), open_filter(args, problems)
    problems.raise_if_any()
    collection = open_collection(args, dataset, problems)
    sizes = count_candidates(collection, problems)
    problems.raise_if_any()

    with ExitStack() as stack:
        skipped = SkippedLog(side_files(args.output)[0], stack)
        counts = write_lines(args, collection, sizes, ranker, skipped)
    skipped.finish()
    record_file(args.output, args, [path for name in INPUTS if (path := getattr(args, name))], counts=counts,
                left_out=skipped.counts, filter_weights=ranker.checksum() if ranker else None)
    if counts["queries short of label 0"]:
        say(f"{counts['queries short of label 0']:,} queries have fewer passages of label 0 than asked for: their "
            f"candidates have no more")
    say(f"{args.output}: " + ", ".join(f"{counts[name]:,} {name}" for name in counts if "short" not in name))


if __name__ == "__main__":
    run_main(main)
