"""The commands that a study runs: their inputs and outputs. Not a script itself."""
import argparse
import json
import sys
from pathlib import Path

from transformers import BertConfig

from experiments.running import Command
from experiments.settings import Settings, Shape, Training, divisor_at_least, slug
from simplified_tinybert.common.files import Problems, atomic_writer
from simplified_tinybert.data.corpus import check_corpus, map_corpus
from simplified_tinybert.data.features import summarise
from simplified_tinybert.model.configuration import read_config
from simplified_tinybert.model.hub import find_model
from simplified_tinybert.tokenization.tokenizer_files import load_vocabulary

ROOT = Path(__file__).resolve().parent.parent
LOG_ROWS = 20                   # rows in the log of a training run; as many checkpoints
SPLITS = ("warm_up", "train", "dev", "test")


class Commands:
    """Builds the commands of a study from its arguments, its settings and the files of its collection."""

    def __init__(self, args: argparse.Namespace, settings: Settings, files: dict[str, Path]):
        self.args, self.settings, self.files, self.out = args, settings, files, args.output_dir
        self.tokenizer_directory = args.teacher_model or args.bert_model        # all models share this tokenizer
        self.counts: dict[str, int] = {}                            # features → number of examples, or of queries

    def script(self, name: str, *arguments: object) -> list[str]:
        """`name`: a script in the repository's root (`distill.py`) or a module (`experiments.cropped_queries`)."""
        program = [str(ROOT / name)] if name.endswith(".py") else ["-m", name]
        return [sys.executable, *program, *map(str, arguments)]

    def texts(self) -> Command:
        """Training pairs for the warm-up, and texts for general distillation."""
        data = self.out / "data"
        return Command("pairs-warm_up", data / "warm_up.tsv", self.script(
            "experiments.cropped_queries", "--docs", self.files["docs"], "--output", data / "warm_up.tsv",
            "--texts", data / "texts.txt", "--examples", max(2, self.settings.warm_up.pairs)))

    def pairs(self, split: str) -> Command:
        output, settings, files = self.out / "data" / f"{split}.tsv", self.settings, self.files
        if split == "train":
            flags = ["train", "--qrels", files["qrels.train"], *settings.sampling.split()]
            if self.args.teacher_model:                 # a fine-tuned teacher can choose the relevant passages
                flags += ["--filter_model", self.args.teacher_model, "--max_seq_length", settings.max_seq_length,
                          "--device", self.args.device]
        else:
            most = getattr(settings, f"{split}_queries")
            flags = ["test", "--qrels", files[f"qrels.{split}"], "--depth", getattr(settings, f"{split}_depth"),
                     *(["--max_queries", most] if most else [])]
        return Command(f"pairs-{split}", output, self.script(
            "prepare_examples.py", *flags, "--docs", files["docs"], "--queries", files[f"queries.{split}"],
            "--candidates", files[f"bm25.{split}"], "--output", output, "--cache_file_dir", self.out / "cache",
            *settings.passages.split()))

    def features(self, name: str) -> Path:
        return self.out / "data" / f"{name}.pkl"

    def tokenize(self, name: str) -> Command:
        return Command(f"tokenize-{name}", self.features(name), self.script(
            "tokenize_to_features.py", "--set_name", "train" if name == "warm_up" else name, "--raw_data_file",
            self.out / "data" / f"{name}.tsv", "--output_features_file", self.features(name), "--bert_model_dir",
            self.tokenizer_directory, "--max_seq_length", self.settings.max_seq_length))

    def examples(self, name: str) -> int:
        if name not in self.counts:
            self.counts[name] = summarise([self.features(name)], Problems()).examples
        return self.counts[name]

    def train(self, output: Path, start: Path, features: str, training: Training, flags: list[str]) -> Command:
        """Return the distill.py command that trains as long as the budget allows. TinyBERT's stages share the budget.

        `training` must have exactly one learning rate and one seed.
        """
        (rate,), (seed,) = training.learning_rates, training.seeds
        examples, stages = self.examples(features), 2 if "tinybert" in flags else 1
        steps = max(stages, round(training.epochs(examples) * -(-examples // training.batch_size)))
        epoch_steps = -(-self.epoch_size(features, flags) // training.batch_size)
        last = steps - steps // 2 if stages == 2 else steps      # steps of the last stage, the only one with validation
        first_stage = ["--intermediate_epochs", (steps - last) / epoch_steps] if stages == 2 else []
        return Command(output.name, output / "model.safetensors", self.script(
            "distill.py", "--features_file", self.features(features), "--general_student_model", start,
            "--output_student_dir", output, "--dev_features_file", self.features("dev"), "--dev_qrels_file",
            self.files["qrels.dev"], "--cache_file_dir", self.out / "cache", "--device", self.args.device, "--resume",
            "--num_train_epochs", last / epoch_steps, *first_stage,
            "--train_batch_size", training.batch_size, "--eval_step", -(-last // training.validations),
            "--train_loss_step", -(-steps // LOG_ROWS), "--save_model_step", -(-steps // LOG_ROWS),
            "--keep_checkpoints", 1, *training.flags.split(), "--seed", seed, "--learning_rate", rate, *flags),
            self.own_weights(start))

    def epoch_size(self, features: str, flags: list[str]) -> int:
        """Number of examples in an epoch: all, or with --group_by_query so many of each query."""
        if "--group_by_query" not in flags:
            return self.examples(features)
        name = f"queries of {features}"
        if name not in self.counts:
            with open(self.out / "data" / f"{features}.tsv", encoding="utf-8") as lines:
                self.counts[name] = len({line.split("\t")[1] for line in lines})
        return self.counts[name] * int(flags[flags.index("--group_by_query") + 1])

    def student_config(self, shape: Shape) -> BertConfig:
        if shape.model:
            return read_config(find_model(shape.model))
        config = read_config(self.tokenizer_directory)
        layers = divisor_at_least(config.num_hidden_layers, shape.depth * config.num_hidden_layers)
        hidden_size = round(shape.width * config.hidden_size / config.num_attention_heads) * config.num_attention_heads
        return BertConfig(**config.to_dict() | {
            "num_hidden_layers": layers, "hidden_size": hidden_size,
            "intermediate_size": config.intermediate_size * hidden_size // config.hidden_size})

    def general_student(self, shape: Shape, teacher: Path, output: Path) -> Command:
        """Return the command that distills a general student on the collection's texts, from the pre-trained BERT."""
        training, texts = self.settings.general, self.out / "data" / "texts.txt"
        with atomic_writer(output.with_suffix(".json")) as handle:
            json.dump(self.student_config(shape).to_dict(), handle, indent=1)
        return Command(output.name, output / "model.safetensors", self.script(
            "general_distill.py", "--corpus", texts, "--teacher_model", teacher, "--student_config",
            output.with_suffix(".json"), "--output_student_dir", output, "--cache_file_dir", self.out / "cache",
            "--device", self.args.device, "--resume", "--learning_rate", shape.general_learning_rate,
            "--train_batch_size", training.batch_size, "--num_train_epochs",
            training.epochs(self.segments(texts)), "--max_seq_length", self.settings.max_seq_length,
            "--keep_checkpoints", 1, "--train_loss_step", 20, *training.flags.split(), *shape.flags.split()),
            self.own_weights(teacher))

    def own_weights(self, model: Path) -> list[Path]:
        """The model's weights if the study makes them; commands that read the model must wait for them."""
        given = model in (self.args.bert_model, self.args.teacher_model)        # it may lie below OUT, too
        return [model / "model.safetensors"] if model.is_relative_to(self.out) and not given else []

    def segments(self, texts: Path) -> int:
        """Number of segments in the texts. They are left in the cache, where general_distill.py finds them."""
        vocabulary, checksum = load_vocabulary(self.tokenizer_directory), check_corpus([texts], "lines", Problems())
        return len(map_corpus([texts], "lines", vocabulary, self.settings.max_seq_length, checksum, self.out / "cache"))

    def scores(self, name: str, split: str) -> Path:
        """A model's scores of the pairs of a split: probabilities, of training pairs log-odds."""
        return self.out / "runs" / f"{name}{'' if split == 'test' else f'.{split}'}.tsv"

    def score(self, name: str, model: Path, split: str, needs: list[Path]) -> Command:
        output = self.scores(name, split)
        return Command(f"rerank-{output.stem}", output, self.script(
            "reranker.py", "--model_dir", model, "--features_file", self.features(split), "--output_scores_file",
            output, "--device", self.args.device, "--resume", *(["--score", "log_odds"] if split == "train" else [])),
            needs)

    def rank(self, name: str, model: Path, split: str, needs: list[Path]) -> list[Command]:
        """The commands that re-rank a split's queries with a model: score the passages, then rank the documents."""
        scores = self.score(name, model, split, needs)
        output = scores.output.with_suffix(".trec")
        return [scores, Command(f"convert-{output.stem}", output, self.script(
            "convert_to_trec_results.py", "--scores_file", scores.output, "--output_results_file", output),
            [scores.output])]


def run_name(shape: str, method: str, rate: float, seed: int) -> str:
    return f"{slug(shape)}-{slug(method)}-{rate:g}-seed{seed}"
