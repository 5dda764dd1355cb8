"""A collection in one directory: its files, and the record of the inputs that a pipeline was started with."""
import json
from pathlib import Path

from tqdm import tqdm

from simplified_tinybert.common.files import Problems, UserError, atomic_writer, check_input_file, say
from simplified_tinybert.common.text import read_json
from simplified_tinybert.data.collection import by_query, read_queries, read_rows
from simplified_tinybert.ranking.trec import check_common_queries, check_relevant, first_ten, read_qrels

FILES = {"docs": "docs.tsv", **{f"{kind}.{split}": f"{kind}.{split}.{ending}" for split in ("train", "dev", "test")
                                for kind, ending in (("queries", "tsv"), ("qrels", "txt"), ("bm25", "txt"))}}


def find_files(collection: Path, problems: Problems) -> dict[str, Path]:
    """Return the files of the collection, plain or .gz. Missing files are added to `problems`."""
    files = {}
    for name, file in FILES.items():
        packed = collection / f"{file}.gz"
        files[name] = packed if packed.exists() and not (collection / file).exists() else collection / file
        check_input_file(files[name], problems, f"{name} of the collection")
    return files


def check_collection(files: dict[str, Path], data: Path, problems: Problems) -> None:
    """Check all files but the documents, and that they fit together, before anything is made in `data`."""
    for split in ("train", "dev", "test"):
        queries_path, path, candidates = (files[f"{kind}.{split}"] for kind in ("queries", "qrels", "bm25"))
        if (data / f"{split}.tsv").exists() or not all(file.is_file() for file in (queries_path, path, candidates)):
            continue                                    # find_files has named missing files
        queries, qrels = read_queries(queries_path, problems), read_qrels(path, problems)
        if queries and qrels and not queries.keys() & qrels.keys():
            problems.add(f"{queries_path}: none of its queries is judged in {path}; do the two files belong together?")
        progress = tqdm(by_query(read_rows(candidates, problems), str(candidates), None, problems),
                        desc=f"checking {candidates.name}", unit=" queries", unit_scale=True)
        ranked, retrieved, before = {}, False, problems.count       # train has too many candidates to keep
        for query_id, documents in progress:
            ranked[query_id] = {}
            retrieved = retrieved or any(qrels.get(query_id, {}).get(document, 0) >= 1 for document in documents)
        check_common_queries(path, qrels, {candidates: ranked}, problems)
        check_relevant(path, qrels, ranked, problems)
        if not retrieved and problems.count == before:
            problems.add(f"{candidates}: none of the relevant documents in {path} is a candidate; do the document ids "
                         f"of the two files agree?")
        if missing := [query_id for query_id in qrels if query_id not in ranked]:
            say(f"{path}: {len(missing):,} of {len(qrels):,} judged queries have no candidates and are left out: "
                f"{first_ten(missing)}")


def keep_inputs(path: Path, inputs: dict[str, object], made: bool) -> None:
    """Save the inputs of a pipeline. Raises UserError if something was `made` from other or unknown inputs."""
    if made and not path.is_file():
        raise UserError(f"{path.parent}: is not empty, and has no {path.name} that says what its files were made from; "
                        f"choose a new directory")
    before = read_json(path, "record of inputs") if made else inputs
    changed = [f"{name} was {before.get(name)!r}, is {inputs.get(name)!r}" for name in before | inputs
               if before.get(name) != inputs.get(name)]
    if changed:
        raise UserError(f"{path.parent}: was started with other inputs: {'; '.join(changed)}; name another "
                        f"directory, or remove {path} and everything in this one that was made from the old inputs")
    with atomic_writer(path) as handle:
        json.dump(inputs, handle, indent=1)
