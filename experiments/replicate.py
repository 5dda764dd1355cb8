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
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts' shared module

from evaluation import best_on_dev, comparisons, first_ranking, rows_of, speeds, values_of
from findings import write_all
from study import Settings, Shape, Step, Training, divisor_at_least, keep_settings, read_settings, run_all

from simplified_tinybert.checkpoints import read_config
from simplified_tinybert.features import summarise
from simplified_tinybert.files import Problems, atomic_writer, check_input_file, locked, run_main, say
from simplified_tinybert.hub import find_model
from simplified_tinybert.preflight import find_models
from simplified_tinybert.runtime import select_device
from simplified_tinybert.trec import read_qrels, read_run

ROOT = Path(__file__).resolve().parent.parent
FILES = {"docs": "docs.tsv", **{f"{kind}.{split}": f"{kind}.{split}.{ending}" for split in ("train", "dev", "test")
                                for kind, ending in (("queries", "tsv"), ("qrels", "txt"), ("bm25", "txt"))}}
STUDENT_FLAGS = "--train_loss_step {log} --eval_step {validate} --save_model_step {validate} --keep_checkpoints 1"


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


class Study:
    """The commands of a study, and where each leaves what it makes."""

    def __init__(self, args: argparse.Namespace, settings: Settings, files: dict[str, Path]):
        self.args, self.settings, self.files, self.out = args, settings, files, args.output_dir
        self.rates: dict[str, list[float]] = {}         # "3/384" → learning rates to be tried
        for name in ("logs", "data", "runs"):
            (self.out / name).mkdir(parents=True, exist_ok=True)

    def run(self, title: str, steps: list[Step]) -> None:
        run_all(title, steps, self.args.jobs, self.out / "logs")

    def command(self, script: str, *arguments: object) -> list[str]:
        return [sys.executable, str(ROOT / script), *map(str, arguments)]

    def prepare(self) -> None:
        """Pairs and features of all splits; texts for general distillation, and examples made of them."""
        data, names = self.out / "data", ("warm_up", "train", "dev", "test")
        warm_up = Step("pairs-warm_up", data / "warm_up.tsv", self.command(
            "experiments/cropped_queries.py", "--docs", self.files["docs"], "--output", data / "warm_up.tsv",
            "--texts", data / "texts.txt", "--examples", max(2, self.settings.warm_up.pairs)))
        self.run("passages", [warm_up, *map(self.pairs, names[1:])])
        self.run("features", [Step(f"tokenize-{name}", self.features(name), self.command(
            "tokenize_to_features.py", "--set_name", "train" if name == "warm_up" else name, "--raw_data_file",
            data / f"{name}.tsv", "--output_features_file", self.features(name), "--bert_model_dir",
            self.args.teacher_model or self.args.bert_model, "--max_seq_length", self.settings.max_seq_length))
            for name in names])

    def pairs(self, split: str) -> Step:
        output, settings, files = self.out / "data" / f"{split}.tsv", self.settings, self.files
        if split == "train":
            how = ["train", "--qrels", files["qrels.train"], *settings.sampling.split()]
        else:
            how = ["test", "--depth", settings.dev_depth if split == "dev" else settings.test_depth]
        return Step(f"pairs-{split}", output, self.command(
            "prepare_examples.py", *how, "--docs", files["docs"], "--queries", files[f"queries.{split}"],
            "--candidates", files[f"bm25.{split}"], "--output", output, "--cache_file_dir", self.out / "cache" / split,
            *settings.passages.split()))

    def features(self, name: str) -> Path:
        return self.out / "data" / f"{name}.pkl"

    def train(self, name: str, output: Path, start: Path, features: str, training: Training, rate: float,
              seed: int, flags: str) -> Step:
        """distill.py with as many epochs as the budget allows; of two stages, each gets half of them."""
        examples = summarise([self.features(features)], Problems()).examples
        in_an_epoch, stages = -(-examples // training.batch_size), 2 if "tinybert" in flags.split() else 1
        steps = max(stages, round(training.epochs(examples) * in_an_epoch))
        often = STUDENT_FLAGS.format(log=-(-steps // 20), validate=-(-steps // training.validations))
        half = ["--intermediate_epochs", steps // 2 / in_an_epoch] if stages == 2 else []
        needs = [start / "model.safetensors"] if start.is_relative_to(self.out) else []
        return Step(name, output / "model.safetensors", self.command(
            "distill.py", "--features_file", self.features(features), "--general_student_model", start,
            "--output_student_dir", output, "--dev_features_file", self.features("dev"), "--dev_qrels_file",
            self.files["qrels.dev"], "--cache_file_dir", self.out / "cache", "--device", self.args.device, "--resume",
            "--seed", seed, "--learning_rate", rate, "--num_train_epochs",
            (steps - steps // 2 if half else steps) / in_an_epoch, *half,
            "--train_batch_size", training.batch_size, *often.split(), *training.flags.split(), *flags.split()), needs)

    def make_models(self) -> tuple[Path, dict[str, Path]]:
        """The teacher that does best on the dev queries, and the students {"3/384": folder, ...} that all start from.

        The steps need each other's results, so that they run as they become possible.
        """
        students, steps = {}, []
        if self.warms_up():
            warm_up = self.settings.warm_up
            steps.append(self.train("warm_up", self.pre_trained(), self.args.bert_model, "warm_up", warm_up,
                                    warm_up.learning_rates[0], 42, "--distill_model finetune"))
        for shape in self.settings.students.values():
            name, folder = self.general_student(shape, steps)
            students[name], self.rates[name] = folder, shape.learning_rates
        outputs = [] if self.args.teacher_model else [
            (rate, self.teacher(rate)) for rate in self.settings.teacher.learning_rates]
        steps += [self.train(output.name, output, self.pre_trained(), "train", self.settings.teacher, rate, 42,
                             "--distill_model finetune") for rate, output in outputs]
        self.run("teacher and general students", steps)
        teacher = max((output for _, output in outputs), key=best_on_dev) / "best" if outputs else None
        return teacher or self.args.teacher_model, students

    def warms_up(self) -> bool:
        return self.settings.warm_up.pairs > 0 and not self.args.teacher_model

    def pre_trained(self) -> Path:
        """The BERT that has not seen a training query: of which the teacher is made, and the general students."""
        return self.out / "warm_up" if self.warms_up() else self.args.bert_model

    def teacher(self, rate: float) -> Path:
        return self.out / f"teacher-{rate:g}"

    def general_student(self, shape: Shape, steps: list[Step]) -> tuple[str, Path]:
        """Name ("3/384") and folder of a general student; the commands that make it are added to `steps`."""
        if shape.model:
            config = read_config(find_model(shape.model))
            return f"{config.num_hidden_layers}/{config.hidden_size}", find_model(shape.model)
        config, training, warm_up = read_config(self.args.teacher_model or self.args.bert_model), \
            self.settings.general, self.settings.student_warm_up
        layers = divisor_at_least(config.num_hidden_layers, shape.depth * config.num_hidden_layers)
        width = round(shape.width * config.hidden_size / config.num_attention_heads) * config.num_attention_heads
        name, texts = f"{layers}/{width}", self.out / "data" / "texts.txt"
        folder = self.out / f"general-{slug(name)}"
        with atomic_writer(folder.with_suffix(".json")) as handle:
            json.dump(config.to_dict() | {
                "num_hidden_layers": layers, "hidden_size": width,
                "intermediate_size": config.intermediate_size * width // config.hidden_size}, handle, indent=1)
        steps.append(Step(folder.name, folder / "model.safetensors", self.command(
            "general_distill.py", "--corpus", texts, "--teacher_model", self.pre_trained(), "--student_config",
            folder.with_suffix(".json"), "--output_student_dir", folder, "--cache_file_dir", self.out / "cache",
            "--device", self.args.device, "--resume", "--learning_rate", training.learning_rates[0],
            "--train_batch_size", training.batch_size, "--num_train_epochs",
            training.epochs(len(texts.read_text(encoding="utf-8").splitlines())), "--keep_checkpoints", 1,
            "--train_loss_step", 20, *training.flags.split()), [self.pre_trained() / "model.safetensors"]))
        if not self.warms_up():
            return name, folder
        warm = folder.with_name(f"{folder.name}-warm")
        steps.append(self.train(warm.name, warm, folder, "warm_up", warm_up, warm_up.learning_rates[0], 42,
                                f"--distill_model simplified --teacher_model {self.pre_trained()}"))
        return name, warm

    def student(self, size: str, method: str, rate: float, seed: int) -> Path:
        return self.out / "students" / slug(size) / f"{slug(method)}-{rate:g}-seed{seed}"

    def distill(self, title: str, teacher: Path, students: dict[str, Path],
                wanted: list[tuple[str, str, float, int]]) -> None:
        """Students of (size, method, learning rate, seed)."""
        steps = []
        for size, method, rate, seed in wanted:
            folder, flags = self.student(size, method, rate, seed), self.settings.methods[method]
            taught = "" if "finetune" in flags.split() else f"--teacher_model {teacher}"
            steps.append(self.train(f"{slug(size)}-{folder.name}", folder, students[size], "train",
                                    self.settings.distillation, rate, seed, f"{flags} {taught} --log_gradients"))
        self.run(title, steps)
        for step in steps:                              # nothing goes on from them any more
            for checkpoint in step.output.parent.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)

    def rerank(self, models: dict[str, Path]) -> None:
        """runs/NAME.trec of each model, over the test queries."""
        runs = self.out / "runs"
        self.run("re-ranking", [Step(f"rerank-{name}", runs / f"{name}.tsv", self.command(
            "reranker.py", "--model_dir", model, "--features_file", self.features("test"), "--output_scores_file",
            runs / f"{name}.tsv", "--device", self.args.device, "--resume")) for name, model in models.items()])
        self.run("rankings", [Step(f"convert-{name}", runs / f"{name}.trec", self.command(
            "convert_to_trec_results.py", "--scores_file", runs / f"{name}.tsv", "--output_results_file",
            runs / f"{name}.trec")) for name in models])


def run_name(shape: str, method: str, seed: int) -> str:
    return f"{slug(shape)}-{slug(method)}-seed{seed}"


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def find_files(collection: Path, problems: Problems) -> dict[str, Path]:
    """The files of the collection, plain or .gz; what is missing is added to `problems`."""
    files = {}
    for name, file in FILES.items():
        packed = collection / f"{file}.gz"
        files[name] = packed if packed.exists() else collection / file
        check_input_file(files[name], problems, f"{name} of the collection")
    return files


def tune(study: Study, teacher: Path, students: dict[str, Path]) -> dict[tuple[str, str], float]:
    """{(size, method): the learning rate that did best on the dev queries with the first seed}."""
    seed, pairs = study.settings.seeds[0], [(size, method) for size in students for method in study.settings.methods]
    study.distill("tuning", teacher, students, [(*pair, rate, seed) for pair in pairs for rate in study.rates[pair[0]]])
    return {pair: max(study.rates[pair[0]], key=lambda rate: best_on_dev(study.student(*pair, rate, seed)))  # noqa: B023
            for pair in pairs}


def development(study: Study) -> dict:
    """nDCG@10 on the dev queries of BM25 and, if it was made here, of the teacher at each learning rate."""
    averages, values = values_of(read_qrels(study.files["qrels.dev"], Problems()),
                                 [first_ranking(study.out / "data" / "dev.tsv")], ["nDCG@10"])
    rates = [] if study.args.teacher_model else study.settings.teacher.learning_rates
    return {"queries": len(values["nDCG@10"]), "BM25": averages["nDCG@10"][0],
            "teacher": {f"{rate:g}": best_on_dev(study.teacher(rate)) for rate in rates}}


def tuning(study: Study, chosen: dict[tuple[str, str], float]) -> dict:
    """What each method reached on the dev queries at each learning rate, and how its losses went at the chosen one."""
    seed = study.settings.seeds[0]
    return {"tuned": [{"shape": shape, "method": method, "learning_rate": rate, "chosen": rate == best,
                       "dev": best_on_dev(study.student(shape, method, rate, seed))}
                      for (shape, method), best in chosen.items() for rate in study.rates[shape]],
            "curves": [{"shape": shape, "method": method,
                        "rows": rows_of(study.student(shape, method, rate, seed) / "train_loss.jsonl")}
                       for (shape, method), rate in chosen.items()]}


def test(study: Study, teacher: Path, chosen: dict[tuple[str, str], float]) -> dict:
    """The test queries, re-ranked by teacher and students, and compared."""
    settings, runs = study.settings, study.out / "runs"
    models = {"teacher": teacher} | {run_name(*pair, seed): study.student(*pair, rate, seed) / "best"
                                     for pair, rate in chosen.items() for seed in settings.seeds}
    study.rerank(models)
    qrels, averages, values = read_qrels(study.files["qrels.test"], Problems()), {}, {}
    systems = {"BM25": [first_ranking(study.out / "data" / "test.tsv")],
               "teacher": [read_run(runs / "teacher.trec", Problems())]}
    for pair in chosen:
        systems[" ".join(pair)] = [read_run(runs / f"{run_name(*pair, seed)}.trec", Problems())
                                   for seed in settings.seeds]
    for name, found in systems.items():
        averages[name], values[name] = values_of(qrels, found, settings.measures)
    shapes = {" ".join(pair): pair[0] for pair in chosen}
    fastest = {shape: models[run_name(*pair, settings.seeds[0])] for pair in chosen for shape in pair[:1]}
    rates, note = speeds({"teacher": teacher, **fastest}, study.features("test"), select_device(study.args.device))
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
    problems.raise_if_any()
    args.bert_model = models["pre-trained BERT"][0]
    args.teacher_model = models["teacher"][0] if args.teacher_model else None
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with locked(args.output_dir):
        keep_settings(args.output_dir / "settings.json", settings, {
            "collection": str(args.collection.resolve()), "bert_model": str(args.bert_model),
            "teacher_model": str(args.teacher_model)})
        study = Study(args, settings, files)
        study.prepare()
        teacher, students = study.make_models()
        if args.until == "models":
            return
        chosen = tune(study, teacher, students)
        study.distill("other seeds", teacher, students, [(*pair, rate, seed) for pair, rate in chosen.items()
                                                         for seed in settings.seeds[1:]])
        results = {"collection": args.collection.name, "settings": asdict(settings), "dev": development(study),
                   **tuning(study, chosen), **(test(study, teacher, chosen) if args.until == "test" else {})}
        with atomic_writer(args.output_dir / "results.json") as handle:
            json.dump(results, handle, indent=1, ensure_ascii=False)
            handle.write("\n")
        write_all(results, "results", args.output_dir)
        say(f"results      {args.output_dir / 'results.json'}")


if __name__ == "__main__":
    run_main(main)
