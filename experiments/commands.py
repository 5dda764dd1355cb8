"""The commands of a study, and where each leaves what it makes. Not a command itself."""
import argparse
import json
import shutil
import sys
from pathlib import Path

from evaluation import best_on_dev
from study import Settings, Shape, Step, Training, divisor_at_least, run_all, slug

from simplified_tinybert.checkpoints import read_config
from simplified_tinybert.corpus import check_corpus, map_corpus
from simplified_tinybert.data.tokenizer_files import load_vocabulary
from simplified_tinybert.features import summarise
from simplified_tinybert.files import Problems, UserError, atomic_writer
from simplified_tinybert.hub import find_model

ROOT = Path(__file__).resolve().parent.parent
ROWS = 20                       # of the log of a training; its checkpoints are as often


class Study:
    """The commands of a study, and where each leaves what it makes."""

    def __init__(self, args: argparse.Namespace, settings: Settings, files: dict[str, Path]):
        self.args, self.settings, self.files, self.out = args, settings, files, args.output_dir
        self.made: set[Path] = set()                    # folders of models that this study makes
        self.students: dict[str, Path] = {}             # "3/384" → general student
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
        self.run("texts", [warm_up, self.pairs("dev")])          # which leaves an index of the documents for the others
        self.run("passages", [self.pairs("train"), self.pairs("test")])
        self.run("features", [Step(f"tokenize-{name}", self.features(name), self.command(
            "tokenize_to_features.py", "--set_name", "train" if name == "warm_up" else name, "--raw_data_file",
            data / f"{name}.tsv", "--output_features_file", self.features(name), "--bert_model_dir",
            self.args.teacher_model or self.args.bert_model, "--max_seq_length", self.settings.max_seq_length))
            for name in names])

    def pairs(self, split: str) -> Step:
        output, settings, files = self.out / "data" / f"{split}.tsv", self.settings, self.files
        if split == "train":
            how = ["train", "--qrels", files["qrels.train"], *settings.sampling.split()]
            if self.args.teacher_model:                 # which knows a relevant passage when it sees one
                how += ["--filter_model", self.args.teacher_model, "--max_seq_length", settings.max_seq_length,
                        "--device", self.args.device]
        else:
            how = ["test", "--depth", settings.dev_depth if split == "dev" else settings.test_depth]
        return Step(f"pairs-{split}", output, self.command(
            "prepare_examples.py", *how, "--docs", files["docs"], "--queries", files[f"queries.{split}"],
            "--candidates", files[f"bm25.{split}"], "--output", output, "--cache_file_dir", self.out / "cache",
            *settings.passages.split()))

    def features(self, name: str) -> Path:
        return self.out / "data" / f"{name}.pkl"

    def train(self, name: str, output: Path, start: Path, features: str, training: Training, rate: float,
              seed: int, flags: list[str]) -> Step:
        """distill.py with as many epochs as the budget allows; of two stages, each gets half of them."""
        examples = summarise([self.features(features)], Problems()).examples
        in_an_epoch, stages = -(-examples // training.batch_size), 2 if "tinybert" in flags else 1
        steps = max(stages, round(training.epochs(examples) * in_an_epoch))
        last = steps - steps // 2 if stages == 2 else steps      # the only ones that are validated
        half = ["--intermediate_epochs", (steps - last) / in_an_epoch] if stages == 2 else []
        needs = [start / "model.safetensors"] if start in self.made else []
        self.made.add(output)
        return Step(name, output / "model.safetensors", self.command(
            "distill.py", "--features_file", self.features(features), "--general_student_model", start,
            "--output_student_dir", output, "--dev_features_file", self.features("dev"), "--dev_qrels_file",
            self.files["qrels.dev"], "--cache_file_dir", self.out / "cache", "--device", self.args.device, "--resume",
            "--seed", seed, "--learning_rate", rate, "--num_train_epochs", last / in_an_epoch, *half,
            "--train_batch_size", training.batch_size, "--eval_step", -(-last // training.validations),
            "--train_loss_step", -(-steps // ROWS), "--save_model_step", -(-steps // ROWS), "--keep_checkpoints", 1,
            *training.flags.split(), *flags), needs)

    def make_models(self) -> Path:
        """Make the general students and the teacher; returns the one that does best on the dev queries."""
        steps = []
        if self.warms_up():
            warm_up = self.settings.warm_up
            steps.append(self.train("warm_up", self.pre_trained(), self.args.bert_model, "warm_up", warm_up,
                                    warm_up.learning_rates[0], 42, ["--distill_model", "finetune"]))
        for shape in self.settings.students.values():
            name, folder = self.general_student(shape, steps)
            if name in self.students:
                raise UserError(f"two of the settings' students are {name} for this teacher; leave one out")
            self.students[name], self.rates[name] = folder, shape.learning_rates
        outputs = [] if self.args.teacher_model else [
            (rate, self.teacher(rate)) for rate in self.settings.teacher.learning_rates]
        steps += [self.train(output.name, output, self.pre_trained(), "train", self.settings.teacher, rate, 42,
                             ["--distill_model", "finetune"]) for rate, output in outputs]
        self.run("teacher and general students", steps)
        if self.args.teacher_model:
            return self.args.teacher_model
        return max((output for _, output in outputs), key=best_on_dev) / "best"

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
            "--device", self.args.device, "--resume", "--learning_rate", shape.general_learning_rate,
            "--train_batch_size", training.batch_size, "--num_train_epochs",
            training.epochs(self.segments(texts)), "--max_seq_length", self.settings.max_seq_length,
            "--keep_checkpoints", 1, "--train_loss_step", 20, *training.flags.split()),
            [self.pre_trained() / "model.safetensors"] if self.warms_up() else []))
        self.made.add(folder)
        if not (self.warms_up() and warm_up.pairs):
            return name, folder
        warm = folder.with_name(f"{folder.name}-warm")
        steps.append(self.train(warm.name, warm, folder, "warm_up", warm_up, shape.general_learning_rate, 42,
                                ["--distill_model", "simplified", "--teacher_model", str(self.pre_trained())]))
        return name, warm

    def segments(self, texts: Path) -> int:
        """How many segments general_distill.py makes of the texts; it finds them in the cache then."""
        vocabulary = load_vocabulary(self.args.teacher_model or self.args.bert_model)
        return len(map_corpus([texts], "lines", vocabulary, self.settings.max_seq_length,
                              check_corpus([texts], "lines", Problems()), self.out / "cache"))

    def student(self, size: str, method: str, rate: float, seed: int) -> Path:
        return self.out / "students" / slug(size) / f"{slug(method)}-{rate:g}-seed{seed}"

    def distill(self, title: str, teacher: Path, wanted: list[tuple[str, str, float, int]]) -> None:
        """Students of (size, method, learning rate, seed)."""
        steps = []
        for size, method, rate, seed in wanted:
            folder, flags = self.student(size, method, rate, seed), self.settings.methods[method].split()
            taught = [] if "finetune" in flags else ["--teacher_model", str(teacher)]
            steps.append(self.train(f"{slug(size)}-{folder.name}", folder, self.students[size], "train",
                                    self.settings.distillation, rate, seed, [*flags, *taught, "--log_gradients"]))
        self.run(title, steps)
        for step in steps:                              # nothing goes on from them any more
            for checkpoint in step.output.parent.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)

    def rerank(self, models: dict[str, Path]) -> None:
        """runs/NAME.trec of each model, over the test queries. The name tells the learning rate as well."""
        runs = self.out / "runs"
        self.run("re-ranking", [Step(f"rerank-{name}", runs / f"{name}.tsv", self.command(
            "reranker.py", "--model_dir", model, "--features_file", self.features("test"), "--output_scores_file",
            runs / f"{name}.tsv", "--device", self.args.device, "--resume")) for name, model in models.items()])
        self.run("rankings", [Step(f"convert-{name}", runs / f"{name}.trec", self.command(
            "convert_to_trec_results.py", "--scores_file", runs / f"{name}.tsv", "--output_results_file",
            runs / f"{name}.trec")) for name in models])


def run_name(shape: str, method: str, rate: float, seed: int) -> str:
    return f"{slug(shape)}-{slug(method)}-{rate:g}-seed{seed}"
