"""The whole study on a collection of your own: teacher, general students, every method, several seeds, the test.

    python -m experiments.replicate experiments/small.toml --collection DIR --output_dir OUT \\
        --bert_model google-bert/bert-base-uncased --device 0

In: the settings (experiments/small.toml tells what each means), a collection as collection.sh takes it (docs.tsv,
queries, qrels and bm25 of train, dev and test), and a pre-trained BERT (directory or hub id).

1. Passages, features. The teacher is trained first on queries cut out of the texts (warm_up, cropped_queries.py), then
   on the training queries; of several learning rates, and of several validations, the best on the dev queries is kept.
   With several seeds the first one teaches. The others only show how much the teacher depends on its seed.
2. A general student of each shape, distilled from the BERT that the teacher was made of, on the collection's texts and
   on the pairs of the warm-up: what the teacher knew before it saw a training query, its students get to know too.
3. From it a student by each method and learning rate, with the first seed, on the whole budget or on a part of it
   (tuning). The dev queries choose the learning rate and when to stop; a best rate at the edge extends the range. Then
   all seeds with that learning rate.
4. The test queries: BM25, teacher, all students. Nothing is chosen by them. --until dev ends before.

Steps 3 and 4 are done for each of the `steps` of the settings in turn; --steps N ends after N of them.

Out, in --output_dir: results.json with the figures of all that is finished, and tables and pictures of them
(experiments/findings.py); what each command said, in logs/; features, models, runs; a record of each model, in records/
or --records. The same command goes on where it was stopped, however it was, and does nothing twice. On another machine
the records suffice: models that have one are trained again only where a missing student or the test queries need their
weights. To train one anew, remove its output and its record. --jobs commands run side by side and share the CPU's
threads.
"""
import argparse
from pathlib import Path

from transformers import BertConfig

from experiments.results import write_results
from experiments.settings import keep_inputs, read_settings
from experiments.study import Study
from simplified_tinybert.common.checks import check_pair, find_models
from simplified_tinybert.common.files import Problems, check_input_file, locked, run_main, say
from simplified_tinybert.common.records import file_identity
from simplified_tinybert.data.collection import by_query, read_rows
from simplified_tinybert.model.tokenizer_files import load_vocabulary
from simplified_tinybert.model.weights import weights_checksum
from simplified_tinybert.ranking.measures import check_common_queries, first_ten
from simplified_tinybert.ranking.trec import read_qrels

DATA = ("max_seq_length", "passages", "sampling", "dev_depth", "test_depth")     # settings that all models share
FILES = {"docs": "docs.tsv", **{f"{kind}.{split}": f"{kind}.{split}.{ending}" for split in ("train", "dev", "test")
                                for kind, ending in (("queries", "tsv"), ("qrels", "txt"), ("bm25", "txt"))}}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("settings", type=Path, help="settings file (TOML)")
    add("--collection", type=Path, required=True, help="directory of the collection")
    add("--output_dir", type=Path, required=True, help="directory for everything the study makes")
    add("--bert_model", required=True, help="directory or hub id of the pre-trained BERT that the teacher is made of")
    add("--teacher_model", help="directory or hub id of a teacher that is fine-tuned already")
    add("--until", choices=("models", "dev", "test"), default="test", help="models: end with teacher and general "
        "students; dev: leave the test queries alone (default: test)")
    add("--steps", type=int, help="end after so many of the steps of the settings (default: all)")
    add("--records", type=Path, help="directory for what is kept of each finished model, instead of records in "
        "--output_dir; a model that has a record there is not trained again")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, or a CUDA index such as 0 (default: auto)")
    add("--jobs", type=int, default=2, help="commands that run side by side (default: 2)")
    return parser.parse_args()


def find_files(collection: Path, problems: Problems) -> dict[str, Path]:
    """The files of the collection, plain or .gz; what is missing is added to `problems`."""
    files = {}
    for name, file in FILES.items():
        packed = collection / f"{file}.gz"
        files[name] = packed if packed.exists() and not (collection / file).exists() else collection / file
        check_input_file(files[name], problems, f"{name} of the collection")
    return files


def check_judgements(files: dict[str, Path], problems: Problems) -> None:
    """Complain about judgements that cannot be read, or judge none of the candidates' queries: now, not after hours."""
    for split in ("train", "dev", "test"):
        path = files[f"qrels.{split}"]
        qrels = read_qrels(path, problems) if path.is_file() else {}
        if split != "train" and files[f"bm25.{split}"].is_file():
            ranked = {query_id: {} for query_id, _ in by_query(read_rows(files[f"bm25.{split}"], problems), "", 1,
                                                               Problems())}
            check_common_queries(path, qrels, {files[f"bm25.{split}"]: ranked}, problems)
            if missing := [query_id for query_id in qrels if query_id not in ranked]:
                say(f"{path}: {len(missing)} judged queries have no candidates and are left out for all systems: "
                    f"{first_ten(missing)}")


def check_models(directories: dict[str, tuple[Path, BertConfig]], problems: Problems) -> None:
    """Complain about models of different vocabularies, and general students that do not go with their teacher."""
    directory, teacher = directories.get("teacher", directories["pre-trained BERT"])
    vocabulary = load_vocabulary(directory).checksum()
    for role, (other, config) in directories.items():
        if load_vocabulary(other).checksum() != vocabulary:
            problems.add(f"{other}: the {role} has another vocabulary than {directory}; all read the same features")
        if role.startswith("student"):
            check_pair(teacher, config, problems)
    if (teacher.hidden_size, teacher.num_attention_heads) != (
            directories["pre-trained BERT"][1].hidden_size, directories["pre-trained BERT"][1].num_attention_heads):
        problems.add(f"{directory}: the teacher is not as wide as --bert_model {directories['pre-trained BERT'][0]}, of which "
                     f"general students are made")


def run(study: Study, steps: int | None) -> None:
    """Step after step, each with its results, as far as --until and --steps go."""
    until, finished = study.args.until, {}
    study.make_models(list(study.shapes) if until == "models" else [], weights=until == "models")
    if until == "test":
        study.test_first()
    for step in study.settings.steps[:steps] if until != "models" else ():
        if step.teachers:
            study.make_other_teachers()
        tried = study.tune([(study.sizes[name], method) for name in step.students for method in step.methods])
        study.distill("students", [(pair, rates[0], seed) for pair, rates in tried.items()
                                   for seed in study.settings.seeds])
        finished |= tried
        write_results(study, finished)
    if until == "models":
        write_results(study, finished)


def main() -> None:
    args, problems = parse_args(), Problems()
    args.collection, args.output_dir = args.collection.resolve(), args.output_dir.resolve()
    settings = read_settings(args.settings, problems)
    files = find_files(args.collection, problems)
    models = find_models({"pre-trained BERT": args.bert_model, "teacher": args.teacher_model} | {
        f"student {name}": shape.model for name, shape in (settings.students.items() if settings else ())}, problems)
    for name in ("jobs", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            problems.add(f"--{name} {getattr(args, name)}: expected 1 or more")
    check_judgements(files, problems)
    problems.raise_if_any()
    check_models(models, problems)
    problems.raise_if_any()
    args.bert_model = models["pre-trained BERT"][0]
    args.teacher_model = models["teacher"][0] if args.teacher_model else None
    args.records = (args.records or args.output_dir / "records").resolve()
    for directory in (args.output_dir, args.records):
        directory.mkdir(parents=True, exist_ok=True)
    with locked(args.output_dir), locked(args.records):
        facts = {name: file_identity(path) for name, path in files.items()} | {
            role: weights_checksum(directory) for role, (directory, _) in models.items()} | {
            name: getattr(settings, name) for name in DATA}
        for directory in (args.output_dir, args.records):
            keep_inputs(directory / "inputs.json", facts)
        study = Study(args, settings, files)
        study.prepare()
        run(study, args.steps)


if __name__ == "__main__":
    run_main(main)
