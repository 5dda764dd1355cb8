"""The whole study on a collection of your own: teacher, general students, every method, several seeds, the test.

    python experiments/replicate.py experiments/small.toml --collection DIR --output_dir OUT \\
        --bert_model google-bert/bert-base-uncased --device 0

In: the settings (experiments/small.toml tells what each means), a collection as collection.sh takes it (docs.tsv,
queries, qrels and bm25 of train, dev and test), and a pre-trained BERT (folder or hub id).

1. Passages, features. The teacher is trained first on queries cut out of the texts (warm_up, cropped_queries.py), then
   on the training queries; of several learning rates, and of several validations, the best on the dev queries is kept.
2. A general student of each shape, distilled from the BERT that the teacher was made of, on the collection's texts and
   on the pairs of the warm-up: what the teacher knew before it saw a training query, its students get to know too.
3. From it a student by each method and learning rate, with the first seed; on the dev queries each method chooses its
   learning rate and when to stop. Then the other seeds with that learning rate.
4. Only now, and once, the test queries: BM25, teacher, all students. --until dev ends before.

Out, in --output_dir: results.json with all figures, and tables and pictures of them (experiments/findings.py); what
each command said, in logs/; features, models, runs. The same command goes on where it was stopped, and does nothing
twice. To start a step anew, remove its output. --jobs commands run side by side and share the CPU's threads.
"""
import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts' shared module

from commands import Study, run_name
from evaluation import best_on_dev, comparisons, first_ranking, rows_of, speeds, values_of
from findings import write_all
from study import keep_facts, read_settings
from transformers import BertConfig

from simplified_tinybert.collection import by_query, read_rows
from simplified_tinybert.data.tokenizer_files import load_vocabulary
from simplified_tinybert.files import Problems, atomic_writer, check_input_file, locked, run_main, say
from simplified_tinybert.measures import check_common_queries, first_ten
from simplified_tinybert.model.weights import weights_fingerprint
from simplified_tinybert.preflight import check_pair, find_models
from simplified_tinybert.records import content_facts
from simplified_tinybert.runtime import select_device
from simplified_tinybert.trec import read_qrels, read_run

FILES = {"docs": "docs.tsv", **{f"{kind}.{split}": f"{kind}.{split}.{ending}" for split in ("train", "dev", "test")
                                for kind, ending in (("queries", "tsv"), ("qrels", "txt"), ("bm25", "txt"))}}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("settings", type=Path, help="settings file (TOML)")
    add("--collection", type=Path, required=True, help="folder of the collection")
    add("--output_dir", type=Path, required=True, help="folder for everything the study makes")
    add("--bert_model", required=True, help="folder or hub id of the pre-trained BERT that the teacher is made of")
    add("--teacher_model", help="folder or hub id of a teacher that is fine-tuned already")
    add("--until", choices=("models", "dev", "test"), default="test", help="models: end with teacher and general "
        "students; dev: leave the test queries alone (default: test)")
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


def check_models(folders: dict[str, tuple[Path, BertConfig]], problems: Problems) -> None:
    """Complain about models of different vocabularies, and general students that do not go with their teacher."""
    folder, teacher = folders.get("teacher", folders["pre-trained BERT"])
    vocabulary = load_vocabulary(folder).fingerprint()
    for role, (other, config) in folders.items():
        if load_vocabulary(other).fingerprint() != vocabulary:
            problems.add(f"{other}: the {role} has another vocabulary than {folder}; all read the same features")
        if role.startswith("student"):
            check_pair(teacher, config, problems)
    if (teacher.hidden_size, teacher.num_attention_heads) != (
            folders["pre-trained BERT"][1].hidden_size, folders["pre-trained BERT"][1].num_attention_heads):
        problems.add(f"{folder}: the teacher is not as wide as --bert_model {folders['pre-trained BERT'][0]}, of which "
                     f"general students are made")


def tune(study: Study, teacher: Path) -> dict[tuple[str, str], float]:
    """{(size, method): the learning rate that did best on the dev queries with the first seed}."""
    seed = study.settings.seeds[0]
    pairs = [(size, method) for size in study.students for method in study.settings.methods]
    study.distill("tuning", teacher, [(*pair, rate, seed) for pair in pairs for rate in study.rates[pair[0]]])
    return {pair: max(study.rates[pair[0]], key=lambda rate: best_on_dev(study.student(*pair, rate, seed)))  # noqa: B023
            for pair in pairs}


def collect(study: Study, chosen: dict[tuple[str, str], float]) -> dict:
    """What the dev queries told: of BM25, teacher and general students, and of each method at each learning rate."""
    seed, settings = study.settings.seeds[0], study.settings
    _, values = values_of(read_qrels(study.files["qrels.dev"], Problems()),
                          [first_ranking(study.out / "data" / "dev.tsv")], ["nDCG@10"])
    stages = {"random order": at_random(study), "BM25": statistics.fmean(values["nDCG@10"].values())}
    if study.warms_up():
        stages |= {"BERT after its warm-up": best_on_dev(study.pre_trained())}
        stages |= {f"general student {size}": best_on_dev(folder) for size, folder in study.students.items()
                   if (folder / "dev.jsonl").is_file()}
    if not study.args.teacher_model:
        stages |= {f"teacher, learning rate {rate:g}": best_on_dev(study.teacher(rate))
                   for rate in settings.teacher.learning_rates}
    return {"collection": study.args.collection.name, "settings": asdict(settings),
            "dev": {"queries": len(values["nDCG@10"]), "nDCG@10": stages},
            "tuned": [{"shape": shape, "method": method, "learning_rate": rate, "chosen": rate == best,
                       "dev": best_on_dev(study.student(shape, method, rate, seed))}
                      for (shape, method), best in chosen.items() for rate in study.rates[shape]],
            "curves": [{"shape": shape, "method": method,
                        "rows": rows_of(study.student(shape, method, rate, seed) / "train_loss.jsonl")}
                       for (shape, method), rate in chosen.items()]}


def at_random(study: Study, rounds: int = 20) -> float:
    """nDCG@10 of the dev candidates in random order, the mean of some: where a ranking that knows nothing begins."""
    random, candidates = Random(42), first_ranking(study.out / "data" / "dev.tsv")
    runs = [{query_id: {document_id: random.random() for document_id in documents}
             for query_id, documents in candidates.items()} for _ in range(rounds)]
    averages, _ = values_of(read_qrels(study.files["qrels.dev"], Problems()), runs, ["nDCG@10"])
    return statistics.fmean(averages["nDCG@10"])


def look_at_test(study: Study, teacher: Path, chosen: dict[tuple[str, str], float]) -> dict:
    """The test queries, re-ranked by teacher and students, and compared."""
    settings, runs = study.settings, study.out / "runs"
    taught_by = "teacher" if study.args.teacher_model else teacher.parent.name
    models = {taught_by: teacher} | {run_name(*pair, rate, seed): study.student(*pair, rate, seed) / "best"
                                     for pair, rate in chosen.items() for seed in settings.seeds}
    study.rerank(models)
    qrels, averages, values = read_qrels(study.files["qrels.test"], Problems()), {}, {}
    systems = {"BM25": [first_ranking(study.out / "data" / "test.tsv")],
               "teacher": [read_run(runs / f"{taught_by}.trec", Problems())]}
    for pair, rate in chosen.items():
        systems[" ".join(pair)] = [read_run(runs / f"{run_name(*pair, rate, seed)}.trec", Problems())
                                   for seed in settings.seeds]
    for name, found in systems.items():
        averages[name], values[name] = values_of(qrels, found, settings.measures)
    shapes = {" ".join(pair): pair[0] for pair in chosen}
    of_shape = {pair[0]: models[run_name(*pair, rate, settings.seeds[0])] for pair, rate in chosen.items()}
    rates, note = speeds({"teacher": teacher, **of_shape}, study.features("test"), select_device(study.args.device))
    rows = [{"name": name, "method": name.removeprefix(f"{shapes.get(name)} "), "shape": None, "seeds": averages[name],
             **rates.get(shapes.get(name, name), {})} for name in systems]
    return {"queries": len(values["BM25"][settings.measures[0]]), "systems": rows, "speed_note": note,
            "comparisons": comparisons(values, shapes, settings.measures, settings.proposed)}


def main() -> None:
    args, problems = parse_args(), Problems()
    settings = read_settings(args.settings, problems)
    files = find_files(args.collection, problems)
    models = find_models({"pre-trained BERT": args.bert_model, "teacher": args.teacher_model} | {
        f"student {name}": shape.model for name, shape in (settings.students.items() if settings else ())}, problems)
    if args.jobs < 1:
        problems.add(f"--jobs {args.jobs}: expected 1 or more")
    check_judgements(files, problems)
    problems.raise_if_any()
    check_models(models, problems)
    problems.raise_if_any()
    args.bert_model = models["pre-trained BERT"][0]
    args.teacher_model = models["teacher"][0] if args.teacher_model else None
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with locked(args.output_dir):
        keep_facts(args.output_dir / "inputs.json", {
            **{name: content_facts(path) for name, path in files.items()},
            **{role: weights_fingerprint(folder) for role, (folder, _) in models.items()}})
        study = Study(args, settings, files)
        study.prepare()
        teacher, chosen = study.make_models(), {}
        if args.until != "models":
            chosen = tune(study, teacher)
            study.distill("other seeds", teacher, [(*pair, rate, seed) for pair, rate in chosen.items()
                                                   for seed in settings.seeds[1:]])
        results = collect(study, chosen) | (look_at_test(study, teacher, chosen) if args.until == "test" else {})
        with atomic_writer(args.output_dir / "results.json") as handle:
            json.dump(results, handle, indent=1, ensure_ascii=False)
            handle.write("\n")
        write_all(results, "results", args.output_dir)
        say(f"results      {args.output_dir / 'results.json'}")


if __name__ == "__main__":
    run_main(main)
