"""From the records of a study to its results.json: everything that is finished. Not a command."""
import json
import statistics
from dataclasses import asdict
from random import Random

from experiments.commands import run_name
from experiments.evaluation import comparisons, first_ranking, speeds, values_of
from experiments.findings import write_all
from experiments.study import Pair, Study
from simplified_tinybert.common.device import select_device
from simplified_tinybert.common.files import Problems, atomic_writer, say
from simplified_tinybert.model.configuration import read_config
from simplified_tinybert.ranking.trec import read_qrels


def write_results(study: Study, rates: dict[Pair, list[float]]) -> None:
    """results.json, tables and pictures of the pairs (shape, method) that are finished.

    rates: the learning rates that were tried for each, the chosen one first.
    """
    results = on_dev(study, rates)
    if study.args.until == "test":
        results |= on_test(study, {pair: tried[0] for pair, tried in rates.items()})
    with atomic_writer(study.out / "results.json") as handle:
        json.dump(results, handle, indent=1, ensure_ascii=False)
        handle.write("\n")
    write_all(results, "results", study.out)
    say(f"results      {study.out / 'results.json'}")


def on_dev(study: Study, rates: dict[Pair, list[float]]) -> dict:
    """What the dev queries told: of BM25, teacher and general students, and of each method at each learning rate."""
    settings, records = study.settings, study.records
    _, values = values_of(read_qrels(study.files["qrels.dev"], Problems()),
                          [first_ranking(study.out / "data" / "dev.tsv")], ["nDCG@10"])
    stages = {"random order": at_random(study), "BM25": statistics.fmean(values["nDCG@10"].values())}
    named = {"BERT after its warm-up": "warm_up"} | {f"general student {size}": study.general_student(size).name
                                                     for size in study.shapes}
    if not study.args.teacher_model:
        first, *others = settings.teacher.seeds
        named |= {f"teacher, learning rate {rate:g}": f"teacher-{rate:g}-seed{first}"
                  for rate in settings.teacher.learning_rates}
        named |= {f"teacher, seed {seed}": name for seed, name in zip(others, study.teacher_names(others))}
    stages |= {title: records.dev(name) for title, name in named.items() if (records.read(name) or {}).get("dev")}
    return {"collection": study.args.collection.name, "settings": asdict(settings),
            "dev": {"queries": len(values["nDCG@10"]), "nDCG@10": stages},
            "tuned": [{"shape": pair[0], "method": pair[1], "learning_rate": rate, "chosen": rate == tried[0],
                       "dev": study.tuned(pair, rate)} for pair, tried in rates.items() for rate in sorted(tried)],
            "curves": [{"shape": pair[0], "method": pair[1],
                        "rows": records.read(run_name(*pair, tried[0], settings.seeds[0]))["losses"]}
                       for pair, tried in rates.items()]}


def at_random(study: Study, rounds: int = 20) -> float:
    """nDCG@10 of the dev candidates in random order, the mean of some: where a ranking that knows nothing begins."""
    random, candidates = Random(42), first_ranking(study.out / "data" / "dev.tsv")
    runs = [{query_id: {document_id: random.random() for document_id in documents}
             for query_id, documents in candidates.items()} for _ in range(rounds)]
    averages, _ = values_of(read_qrels(study.files["qrels.dev"], Problems()), runs, ["nDCG@10"])
    return statistics.fmean(averages["nDCG@10"])


def on_test(study: Study, rates: dict[Pair, float]) -> dict:
    """The test queries, re-ranked by teachers and students, and compared."""
    settings, teachers = study.settings, study.teacher_names(study.settings.teacher.seeds)
    models = {" ".join(pair): [run_name(*pair, rate, seed) for seed in settings.seeds] for pair, rate in rates.items()}
    averages, values = {}, {}
    for name, seeds in ({"BM25": ["BM25"], "teacher": teachers[:1]} | models).items():
        averages[name], values[name] = study.records.test(seeds, settings.measures)
    shapes, speed = {" ".join(pair): pair for pair in rates}, measured_speeds(study)
    rows = [{"name": name, "method": shapes[name][1] if name in shapes else name, "shape": None,
             "seeds": averages[name]} | ({} if name == "BM25" else speed["shapes"][
                 shapes[name][0] if name in shapes else study.teacher_shape]) for name in values]
    return {"queries": len(values["BM25"][settings.measures[0]]), "systems": rows, "speed_note": speed["note"],
            "teacher_seeds": {str(seed): study.records.test([name], settings.measures)[0]
                              for seed, name in zip(settings.teacher.seeds, teachers) if not study.needs_test(name)},
            "comparisons": comparisons(values, {name: pair[0] for name, pair in shapes.items()}, settings.measures,
                                       settings.proposed)}


def measured_speeds(study: Study) -> dict:
    """Speeds of all shapes, measured once; to measure again, remove speeds.json from the records."""
    known, teacher = study.records.read("speeds"), read_config(study.commands.vocabulary)
    configs = {study.teacher_shape: teacher} | {
        size: study.commands.student_config(shape) for size, shape in study.shapes.items()}
    if not known or set(known["shapes"]) != set(configs):
        for config in configs.values():
            config.num_labels = 2
        known = speeds(configs, study.commands.features("test"), select_device(study.args.device))
        study.records.write("speeds", known)
    return known
