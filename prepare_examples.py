"""Create training examples or test pairs from a collection: split its documents into passages.

    python prepare_examples.py train --docs docs.tsv.gz --queries queries.train.tsv --qrels qrels.train.txt \\
        --candidates top100.train.txt --output train.tsv --title --filter_model nboost/pt-bert-base-uncased-msmarco
    python prepare_examples.py test --docs docs.tsv.gz --queries queries.test.tsv --candidates top100.test.txt \\
        --output pairs.tsv --title
    python prepare_examples.py test --dataset msmarco-document/trec-dl-2019 --output pairs.tsv --title

In, UTF-8, plain or gzip. --dataset takes them from the ir_datasets package; a file replaces its part of the dataset:
    docs        document_id <tab> url <tab> title <tab> body, or document_id <tab> text
    queries     query_id <tab> query
    candidates  query_id Q0 document_id rank score run_tag (a TREC run), or query_id document_id rank;
                the lines of a query must be contiguous
    qrels       query_id 0 document_id grade
Out, queries in the order of the candidates:
    train       index <tab> query <tab> passage <tab> label        label 1: relevant, 0: not
    test        query_id#document_id_n <tab> query <tab> passage   n = 0, 1, 2 ... within the document
OUTPUT.run.json records flags, inputs and counts. Queries and documents that cannot be used (for example a missing
document) are counted on stderr and listed in OUTPUT.left_out.tsv: kind <tab> query_id <tab> document_id. In train,
only documents that were looked up are listed.

Passages are windows over the words of the body. They start at word 0, stride, 2 * stride ... until the end is covered.
test:  all passages of the candidates.
train: passages of relevant documents have label 1. Not all of them are relevant: --filter_model keeps those that a
ranker scores highest. Passages of label 0 come from candidates that are unjudged or judged not relevant, spread over as
many of these as possible. Passages that also occur in a relevant document are excluded. Documents of a positive grade
below --relevance_level are not used. Queries without passages of both labels are skipped.

Documents stay on disk. Their index is built once in --cache_file_dir; .gz files are unpacked there.

With --filter_model, several GPUs of a machine, or several machines, share the scoring. The first process writes:

    torchrun --standalone --nproc_per_node=4 prepare_examples.py train --filter_model MODEL ...
"""
import argparse
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from simplified_tinybert.common.files import (
    Problems,
    UserError,
    atomic_writer,
    check_input_file,
    check_output_files,
    check_ranges,
    process_count,
    process_number,
    run_main,
    say,
)
from simplified_tinybert.common.records import record_file, record_path
from simplified_tinybert.common.text import in_groups
from simplified_tinybert.data.collection import Collection, count_candidates, open_collection
from simplified_tinybert.data.ir_dataset import open_dataset
from simplified_tinybert.data.passages import PassageSource, PassageWindow, SkippedLog
from simplified_tinybert.data.sampling import (
    Sampling,
    TrainingQuery,
    draw_queries,
    negatives,
    positives,
    relevant_documents,
    training_queries,
)

if TYPE_CHECKING:
    from simplified_tinybert.data.passage_filter import PassageFilter

INPUTS = {"docs": "documents", "queries": "queries", "qrels": "judgements", "candidates": "candidates"}
TRAIN_ONLY = {"relevance_level": 1, "negatives": 1.0, "positive_passages": None, "retrieved_positives": False,
              "filter_model": None, "filter_threshold": None, "max_seq_length": 256, "device": "auto", "bf16": False}
GROUP = 8192        # passages that are scored together
FILTER_ONLY = ("filter_threshold", "max_seq_length", "device", "bf16")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("set_name", choices=("train", "test"), help="training examples, or pairs to re-rank")
    add("--docs", type=Path, help="documents, plain or .gz")
    add("--queries", type=Path, help="queries")
    add("--candidates", type=Path, help="candidate documents of each query")
    add("--qrels", type=Path, help="judgements (test: optional, only as a file; then only judged queries are "
        "used)")
    add("--dataset", metavar="ID", help="ir_datasets id of a dataset, which supplies every input without a file")
    add("--output", type=Path, required=True, help="file to write")
    add("--window", type=int, default=150, help="maximum number of words in a passage, title excluded (default: 150)")
    add("--stride", type=int, default=75, help="words between the starts of two passages (default: 75)")
    add("--title", action="store_true", help="prepend the document's title to each passage")
    add("--first_passages", type=int, metavar="N", help="use the first N passages of a document (default: all)")
    add("--depth", type=int, metavar="N", help="use the N best candidates of each query (default: all)")
    add("--max_queries", type=int, metavar="N", help="use N queries drawn at random (default: all)")
    add("--seed", type=int, default=42, help="seed of all random draws (default: 42)")
    add("--cache_file_dir", type=Path, default=Path("cache"),
        help="directory for the document index and the unpacked text of .gz files (default: cache)")
    add = parser.add_argument_group("train only").add_argument
    add("--relevance_level", type=int, help="lowest grade that counts as relevant (default: 1)")
    add("--negatives", type=float, help="negative passages per positive one, may be a fraction (default: 1)")
    add("--positive_passages", type=int, metavar="N", help="maximum number of passages per relevant document: drawn at "
        "random, or the best with --filter_model (default: all; 1 if --filter_model has no --filter_threshold)")
    add("--retrieved_positives", action="store_true", default=None, help="use relevant documents only if they are "
        "candidates, as in re-ranking. Use it if the first-stage ranking misses most relevant documents: the missed "
        "ones would teach that relevant passages share few words with their query")
    add("--filter_model", metavar="MODEL", help="ranker (directory or hub id) that selects passages of relevant "
        "documents")
    add("--filter_threshold", type=float, metavar="P", help="keep passages with a probability of at least P according "
        "to --filter_model (default: 0)")
    add("--max_seq_length", type=int, help="maximum number of tokens in a pair for --filter_model (default: 256)")
    add("--device", help="device of --filter_model: auto, cpu, cuda, cuda:1, or a CUDA index, 0 or 1 (default: auto)")
    add("--bf16", action="store_true", default=None, help="run --filter_model in bfloat16")
    return parser.parse_args()


def side_files(output: Path) -> tuple[Path, Path]:
    """Return two paths: the log of skipped queries and documents, and the run record."""
    return output.with_name(output.name + ".left_out.tsv"), record_path(output)


def check_args(args: argparse.Namespace, problems: Problems) -> None:
    """Check flags and files, and set the defaults of the training flags."""
    given = [name for name in TRAIN_ONLY if getattr(args, name) is not None]
    if args.set_name == "test":
        for name in given:
            problems.add(f"--{name}: is for train only; leave it out")
    elif not args.filter_model:
        for name in [name for name in given if name in FILTER_ONLY]:
            problems.add(f"--{name}: needs --filter_model; add it, or leave --{name} out")
    for name in set(TRAIN_ONLY) - set(given):
        setattr(args, name, TRAIN_ONLY[name])
    if args.filter_model and args.positive_passages is None and args.filter_threshold is None:
        args.positive_passages = 1
    rules = [("window", args.window >= 1, "1 word or more"),
             ("stride", 1 <= args.stride <= max(1, args.window), "1 to --window, otherwise words would be lost"),
             ("negatives", 0 <= args.negatives < 1e6, "0 or more"),
             *((name, getattr(args, name) is None or getattr(args, name) >= 1, "1 or more") for name in
               ("first_passages", "depth", "relevance_level", "positive_passages", "max_queries")),
             ("filter_threshold", args.filter_threshold is None or 0 <= args.filter_threshold <= 1, "0 to 1")]
    check_ranges(args, problems, rules)
    paths = {path: content for name, content in INPUTS.items() if (path := getattr(args, name))}
    for path, content in paths.items():
        check_input_file(path, problems, content, read_twice=True)
    check_output_files([args.output, *side_files(args.output)], problems, inputs=paths)
    if args.cache_file_dir.exists() and not args.cache_file_dir.is_dir():
        problems.add(f"--cache_file_dir {args.cache_file_dir}: is a file; name a directory")


def test_lines(collection: Collection, chosen: set[str], passages: PassageSource, progress: tqdm) -> Iterator[str]:
    """Yield an output line for each passage of each candidate of the `chosen` queries."""
    for query_id, ranked in collection.candidates(Problems()):
        if query_id not in chosen:
            continue
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
    """Yield the output lines of all `queries` and update `counts`."""
    for group in in_groups(queries, lambda query: sum(len(found) for _, found in query.sources), GROUP):
        for query, kept in zip(group, positives(group, sampling, ranker and ranker.probabilities, passages.skipped)):
            drawn, requested = negatives(query, len(kept), sampling, passages)
            if not kept or requested and not drawn:
                passages.skipped.add(f"query_without_{'negative' if kept else 'positive'}_passage", query.query_id)
                continue
            for label, texts in ((1, kept), (0, drawn)):
                for passage in texts:
                    index = counts["label 0"] + counts["label 1"]
                    yield f"{index}\t{query.text}\t{passage}\t{label}\n"
                    counts[f"label {label}"] += 1
            counts["queries"] += 1
            counts["queries short of label 0"] += len(drawn) < requested


def log_absent_queries(collection: Collection, sizes: dict[str, int], level: int, skipped: SkippedLog) -> None:
    """Log queries without candidates, and relevant judgements of queries without a text."""
    for query_id in collection.queries:
        if query_id not in sizes:
            skipped.add("query_without_candidates", query_id)
    for query_id in collection.grades:
        known = query_id in sizes or query_id in collection.queries
        if not known and relevant_documents(collection, query_id, level):
            skipped.add("query_without_text", query_id)


def is_usable(query_id: str, collection: Collection, args: argparse.Namespace) -> bool:
    """Whether a query may be drawn by --max_queries. Without this flag, test also takes queries without a text."""
    if args.set_name == "train":
        return bool(collection.queries.get(query_id) and relevant_documents(collection, query_id, args.relevance_level))
    judged = not args.qrels or query_id in collection.grades
    return judged and (args.max_queries is None or bool(collection.queries.get(query_id)))


def write_lines(args: argparse.Namespace, collection: Collection, sizes: dict[str, int],
                ranker: "PassageFilter | None", skipped: SkippedLog) -> Counter:
    """Write the output and return the counts. Processes other than the first compute the same lines, but write none."""
    window = PassageWindow(args.window, args.stride, args.title, args.first_passages)
    passages, counts = PassageSource(collection.documents, window, skipped), Counter()
    usable = [query_id for query_id in sizes if is_usable(query_id, collection, args)]
    chosen = set(usable) if args.max_queries is None else draw_queries(usable, args.max_queries, args.seed)
    if args.set_name == "train":
        sampling = Sampling(args.relevance_level, args.negatives, args.positive_passages,
                            args.filter_threshold or 0.0, args.retrieved_positives, args.seed)
        progress = tqdm(training_queries(collection, chosen, sampling, passages), total=len(chosen), desc="sampling",
                        unit=" queries", unit_scale=True)
        lines = train_lines(progress, sampling, ranker, passages, counts)
    else:
        for query_id in sizes if args.qrels else ():
            if query_id not in collection.grades:
                skipped.add("query_without_judgement", query_id)
        progress = tqdm(total=sum(sizes[query_id] for query_id in chosen), desc="splitting", unit=" documents",
                        unit_scale=True)
        lines = test_lines(collection, chosen, passages, progress)
    with progress, (atomic_writer(args.output) if skipped.path else open(os.devnull, "w", encoding="utf-8")) as handle:
        for line in lines:
            handle.write(line)
            counts["lines"] += 1
        log_absent_queries(collection, sizes, args.relevance_level, skipped)
        progress.close()
        skipped.print_counts()
        if not counts["lines"]:
            raise UserError(f"{args.output}: not written, because these inputs give no lines (see above); check that "
                            f"they belong to the same collection")
    return counts


def main() -> None:
    args, problems, first = parse_args(), Problems(), process_number("RANK") == 0
    check_args(args, problems)
    dataset, ranker = open_dataset(args, problems), None
    if args.filter_model:
        from simplified_tinybert.common.processes import process_group  # slow to import, like the next one
        from simplified_tinybert.data.passage_filter import PassageFilter
        ranker = PassageFilter(args, problems)
    elif process_count() > 1:
        problems.add(f"{process_count()} processes: only --filter_model can use several; start one")
    if process_count() > 1 and not args.docs:
        problems.add("--dataset: with several processes, name the documents as --docs")
    problems.raise_if_any()
    with ExitStack() as stack:
        if ranker:
            ranker.processes = stack.enter_context(process_group(ranker.device))
        with ranker.processes.first_on_machine() if ranker else nullcontext():      # it indexes the documents
            collection = open_collection(args, dataset, problems)
            sizes = count_candidates(collection, problems)
        problems.raise_if_any()
        skipped = SkippedLog(side_files(args.output)[0] if first else None, stack)
        counts = write_lines(args, collection, sizes, ranker, skipped)
    if not first:
        return
    skipped.finish()
    record_file(args.output, args, [path for name in INPUTS if (path := getattr(args, name))], counts=counts,
                left_out=skipped.counts, filter_weights=ranker.checksum() if ranker else None)
    if counts["queries short of label 0"]:
        say(f"{counts['queries short of label 0']:,} queries have fewer passages of label 0 than requested: their "
            f"candidates have no more")
    say(f"{args.output}: " + ", ".join(f"{counts[name]:,} {name}" for name in counts if "short" not in name))


if __name__ == "__main__":
    run_main(main, distributed=True)
