"""Run the whole study on a collection of your own: teacher, general students, all methods, several seeds, test.

    python -m experiments.replicate experiments/small.toml --collection DIR --output_dir OUT \\
        --bert_model google-bert/bert-base-uncased --device 0

In: the settings (experiments/small.toml and settings.py explain them), a collection as for collection.sh (docs.tsv;
queries, qrels and bm25 of train, dev and test), and a pre-trained BERT (directory or hub id).

1. Make passages and features. Train the teacher on queries cut out of the texts (warm_up, cropped_queries.py), then on
   the training queries. The dev queries choose its learning rate and checkpoint. If the teacher has several seeds, the
   first one teaches the students. The others show how much teachers vary. Methods with TEACHERS in their flags learn
   from the scores of all of them.
2. Distill a general student of each shape from the BERT that the teacher was made from, on the collection's texts and
   on the pairs of the warm-up. So teacher and students start from the same knowledge.
3. From the general student, train a student by each method and learning rate with the first seed, on the full budget or
   a part of it (tuning). The dev queries choose the learning rate and checkpoint. If the best rate is the lowest or the
   highest one, the range is extended. Then train with all seeds at the chosen learning rate.
4. Evaluate BM25, teacher and all students on the test queries, on which nothing is chosen. --until dev leaves this out.

Stages 3 and 4 are run for each of the `steps` in the settings in turn; --steps N stops after N of them. A step with
`interpolation` also combines the teacher, and all students so far, with BM25. The dev queries choose the weights.

Out, in --output_dir: results.json with all finished results, tables and pictures (experiments/findings.py), logs/,
features, models, runs; and a record of each model, in records/ or --records. After any interruption, the same command
continues where it stopped. On another machine the records are enough: a recorded model is trained again only if its
weights are needed by a missing student, the test queries, an interpolation or an ensemble. To train a model again,
remove its output and its record. --jobs commands run in parallel and share the CPU cores.
"""
import argparse
from pathlib import Path

from experiments.plan import say_teacher, say_work
from experiments.results import results_of_students, write_results
from experiments.settings import Settings, read_settings
from experiments.study import Pair, Study
from simplified_tinybert.checks.collection_directory import check_collection, find_files, keep_inputs
from simplified_tinybert.checks.compatibility import check_pair
from simplified_tinybert.common.device import select_device
from simplified_tinybert.common.files import Problems, check_ranges, run_main, say
from simplified_tinybert.common.processes import locked
from simplified_tinybert.common.records import file_identity
from simplified_tinybert.common.workers import available_cores
from simplified_tinybert.model.configuration import Models, find_models
from simplified_tinybert.model.weights import weights_checksum
from simplified_tinybert.tokenization.tokenizer_files import load_vocabulary


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("settings", type=Path, help="settings file (TOML)")
    add("--collection", type=Path, required=True, help="directory of the collection")
    add("--output_dir", type=Path, required=True, help="directory for all outputs of the study")
    add("--bert_model", required=True, help="directory or hub id of the pre-trained BERT that becomes the teacher")
    add("--teacher_model", help="directory or hub id of a teacher that is already fine-tuned")
    add("--until", choices=("models", "dev", "test"), default="test", help="models: stop after teacher and general "
        "students; dev: do not use the test queries (default: test)")
    add("--steps", type=int, help="stop after this many steps of the settings (default: all)")
    add("--records", type=Path, help="directory for the records of finished models (default: records in --output_dir); "
        "a model with a record there is not trained again")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, or a CUDA index such as 0 (default: auto)")
    add("--jobs", type=int, default=2, help="commands to run in parallel (default: 2)")
    return parser.parse_args()


def check_models(models: Models, settings: Settings, problems: Problems) -> None:
    """Check that all models share a vocabulary and can read the pairs, and that BERT and students fit the teacher."""
    bert_directory, bert = models["pre-trained BERT"]
    directory, teacher = models.get("teacher", models["pre-trained BERT"])
    vocabulary = load_vocabulary(directory).checksum()
    for role, (other, config) in models.items():
        if load_vocabulary(other).checksum() != vocabulary:
            problems.add(f"{other}: the {role} has another vocabulary than {directory}; all models read the same "
                         f"features")
        if settings.max_seq_length > config.max_position_embeddings:
            problems.add(f"{other}: the {role} has {config.max_position_embeddings} positions; lower max_seq_length in "
                         f"the settings, which is {settings.max_seq_length}")
        if role.startswith("student"):
            check_pair(teacher, config, problems)
    if (teacher.hidden_size, teacher.num_attention_heads) != (bert.hidden_size, bert.num_attention_heads):
        problems.add(f"{directory}: the teacher's hidden size or heads differ from those of {bert_directory} "
                     f"(--bert_model), from which the general students are made")


def run(study: Study, steps: int | None) -> None:
    """Run the steps one after the other, up to --until and --steps, and write results after each."""
    say_work(study, steps)
    only_models = study.args.until == "models"
    study.make_models(list(study.shapes) if only_models else [], weights=only_models)
    if study.args.until == "test":
        study.test_first()
    results = results_of_students(study.out / "results.json")
    results = results or write_results(study, {})               # tables of the teacher replace none of students
    say_teacher(study, results["dev"]["nDCG@10"], steps)
    if only_models:
        return
    finished = {}
    chosen = study.settings.steps[:steps]
    study.check_starts(list(dict.fromkeys(study.sizes[name] for step in chosen for name in step.students)))
    for step in chosen:
        if step.teachers:
            study.make_other_teachers()
        tuned = study.tune([(study.sizes[name], method) for name in step.students for method in study.methods(step)])
        study.distill("students", with_seeds(study, tuned), study.rankings.testing)
        finished |= tuned
        if step.interpolation:
            study.interpolate(with_seeds(study, finished))
        write_results(study, finished)


def with_seeds(study: Study, tuned: dict[Pair, list[float]]) -> list[tuple[Pair, float, int]]:
    """All students at the chosen learning rates: first all pairs with the first seed, then with the next."""
    return [(pair, rates[0], seed) for seed in study.settings.seeds for pair, rates in tuned.items()]


def main() -> None:
    args, problems = parse_args(), Problems()
    args.collection, args.output_dir = args.collection.resolve(), args.output_dir.resolve()
    settings = read_settings(args.settings, problems)
    files = find_files(args.collection, problems)
    models = find_models({"pre-trained BERT": args.bert_model, "teacher": args.teacher_model} | {
        f"student {name}": shape.model for name, shape in (settings.students.items() if settings else ())}, problems)
    args.records = (args.records or args.output_dir / "records").resolve()
    if args.records == args.output_dir:
        problems.add("--records: is the same directory as --output_dir; name another one")
    check_ranges(args, problems, [(name, getattr(args, name) is None or getattr(args, name) >= 1, "1 or more")
                                  for name in ("jobs", "steps")])
    check_collection(files, args.output_dir / "data", problems)
    problems.raise_if_any()
    check_models(models, settings, problems)
    problems.raise_if_any()
    say(f"device       {select_device(args.device)}, {available_cores()} cores, up to {args.jobs} commands at a time")
    args.bert_model = models["pre-trained BERT"].directory.resolve()
    args.teacher_model = models["teacher"].directory.resolve() if args.teacher_model else None
    for directory in (args.output_dir, args.records):
        directory.mkdir(parents=True, exist_ok=True)
    with locked(args.output_dir), locked(args.records):
        inputs = {name: file_identity(path) for name, path in files.items()} | {
            role: weights_checksum(directory) for role, (directory, _) in models.items()} | {
            name: getattr(settings, name) for name in ("max_seq_length", "passages", "sampling", "dev_depth",
                                                       "dev_queries", "test_depth", "test_queries")}
        keep_inputs(args.output_dir / "inputs.json", inputs, made=any((args.output_dir / "data").glob("*.*")))
        recorded = {path.name for path in args.records.glob("*.json")} - {"inputs.json"}
        keep_inputs(args.records / "inputs.json", inputs, made=bool(recorded))
        study = Study(args, settings, files)
        study.prepare()
        run(study, args.steps)


if __name__ == "__main__":
    run_main(main)
