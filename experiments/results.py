"""Write results.json from the records of a study. Not a command."""
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from random import Random

from experiments.commands import run_name
from experiments.evaluation import compare_family, comparisons, first_ranking, speeds, values_of
from experiments.findings import write_all
from experiments.study import Pair, Study
from simplified_tinybert.common.device import select_device
from simplified_tinybert.common.files import Problems, atomic_writer, say
from simplified_tinybert.common.text import read_json
from simplified_tinybert.data.collection import read_rows
from simplified_tinybert.model.configuration import read_config
from simplified_tinybert.ranking.measures import Qrels, Run
from simplified_tinybert.ranking.trec import read_qrels


def write_results(study: Study, rates: dict[Pair, list[float]]) -> dict:
    """Write results.json, tables and pictures, and return the results.

    rates: the learning rates tried for each pair (shape, method), the chosen one first. Only these pairs are included.
    """
    results = dev_results(study, rates)
    if study.args.until == "test":
        results |= test_results(study, {pair: chosen for pair, (chosen, *_) in rates.items()})
    with atomic_writer(study.out / "results.json") as handle:
        json.dump(results, handle, indent=1, ensure_ascii=False)
        handle.write("\n")
    write_all(results, "results", study.out)
    say(f"results      {study.out / 'results.json'}")
    return results


def results_of_students(path: Path) -> dict | None:
    """Return the content of a results.json, or None if it does not exist or has no students yet."""
    results = read_json(path)
    return results if results.get("tuned") else None


def dev_results(study: Study, rates: dict[Pair, list[float]]) -> dict:
    """Results on the dev queries: BM25, teacher, general students, and each method at each learning rate."""
    settings, records = study.settings, study.records
    qrels, bm25 = read_qrels(study.files["qrels.dev"], Problems()), first_ranking(study.out / "data" / "dev.tsv")
    values = values_of(qrels, [bm25], ["nDCG@10"])[1]["nDCG@10"]
    names = {"BERT after its warm-up": "warm_up"} | {f"general student {size}": study.general_student(size).name
                                                     for size in study.shapes}
    if not study.args.teacher_model:
        first, *others = settings.teacher.seeds
        names |= {f"teacher, learning rate {rate:g}": f"teacher-{rate:g}-seed{first}"
                  for rate in settings.teacher.learning_rates}
        names |= {f"teacher, seed {seed}": name for seed, name in zip(others, study.teacher_names(others))}
    stages = {"random order": random_order(qrels, bm25), "BM25": statistics.fmean(values.values())} | {
        title: records.dev(name) for title, name in names.items() if (records.read(name) or {}).get("dev")}
    return {"collection": study.args.collection.name, "settings": asdict(settings),
            "dev": {"queries": len(values), "nDCG@10": stages},
            "tuned": [{"shape": shape, "method": method, "learning_rate": rate, "chosen": rate == tried[0],
                       "dev": study.dev_result((shape, method), rate)}
                      for (shape, method), tried in rates.items() for rate in sorted(tried)],
            "curves": [{"shape": shape, "method": method,
                        "rows": records.read(run_name(shape, method, tried[0], settings.seeds[0]))["losses"]}
                       for (shape, method), tried in rates.items()]}


def random_order(qrels: Qrels, candidates: Run) -> float:
    """Mean nDCG@10 of 20 random orders of the candidates."""
    random = Random(42)
    runs = [{query_id: {document_id: random.random() for document_id in documents}
             for query_id, documents in candidates.items()} for _ in range(20)]
    return statistics.fmean(values_of(qrels, runs, ["nDCG@10"])[0]["nDCG@10"])


def test_results(study: Study, rates: dict[Pair, float]) -> dict:
    """Results on the test queries: BM25, teachers and students, speeds and comparisons.

    Seeds are left out if a student has not ranked the test queries with them. A complete step has no such seed.
    """
    settings, teachers = study.settings, study.teacher_names(study.settings.teacher.seeds)
    tested = {str(seed): name for seed, name in zip(settings.teacher.seeds, teachers)
              if not study.rankings.needs_test(name)}
    seeds = [seed for seed in settings.seeds
             if not any(study.rankings.needs_test(run_name(*pair, rate, seed)) for pair, rate in rates.items())]
    models = {" ".join(pair): [run_name(*pair, rate, seed) for seed in seeds] for pair, rate in rates.items()}
    averages, values = {}, {}
    for name, of_seeds in ({"BM25": ["BM25"], "teacher": teachers[:1]} | models).items():
        averages[name], values[name] = study.records.test(of_seeds, settings.measures)
    interpolated = interpolation_results(study, {"teacher": teachers[:1]} | models)
    pairs, speed = {" ".join(pair): pair for pair in rates}, measured_speeds(study)
    systems = []
    for name, by_measure in averages.items():
        shape, method = pairs.get(name, (study.teacher_shape, name))
        systems.append({"name": name, "method": method, "shape": None, "seeds": by_measure}
                       | (speed["shapes"][shape] if name != "BM25" else {}))
    qrels, bm25 = read_qrels(study.files["qrels.test"], Problems()), first_ranking(study.out / "data" / "test.tsv")
    ranked = {query_id for _, query_id, *_ in read_rows(study.files["bm25.test"], Problems())}
    return {"queries": len(values["BM25"][settings.measures[0]]), "systems": systems, "speed_note": speed["note"],
            "candidates": statistics.fmean(map(len, bm25.values())), "without_candidates": len(qrels.keys() - ranked),
            "teacher_seeds": {seed: study.records.test([name], settings.measures)[0] for seed, name in tested.items()},
            "interpolated": interpolated,
            "comparisons": comparisons(values, {name: pair[0] for name, pair in pairs.items()}, settings.measures,
                                       settings.proposed)}


def interpolation_results(study: Study, models: dict[str, list[str]]) -> dict:
    """Each system's interpolation with BM25, compared with the system alone. Systems without one are left out.

    models: system → names of its models, one per seed.
    """
    measures, values, found = study.settings.measures, {}, {}
    for system, names in models.items():
        if all(map(study.rankings.is_interpolated, names)):
            averages, values[f"{system} + BM25"] = study.records.test(names, measures, "interpolated")
            _, values[system] = study.records.test(names, measures, "not_interpolated")
            found[system] = {"weights": [study.records.read(name)["interpolated"]["weight"] for name in names],
                             "seeds": averages}
    pairs = {system: (f"{system} + BM25", system) for system in found}
    families = {measure: compare_family(values, measure, pairs) for measure in measures} if found else {}
    return {system: each | {"minus_alone": {measure: family[system] for measure, family in families.items()}}
            for system, each in found.items()}


def measured_speeds(study: Study) -> dict:
    """Measure the speed of each shape once. To measure again, remove speeds.json from the records."""
    known, teacher = study.records.read("speeds"), read_config(study.commands.tokenizer_directory)
    configs = {study.teacher_shape: teacher} | {
        size: study.commands.student_config(shape) for size, shape in study.shapes.items()}
    if not known or set(known["shapes"]) != set(configs):
        for config in configs.values():
            config.num_labels = 2
        known = speeds(configs, study.commands.features("test"), select_device(study.args.device))
        study.records.write("speeds", known)
    return known
