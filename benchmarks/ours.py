"""The only place where the benchmarks call the code they measure. Not a command."""
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig

from benchmarks.common import ROOT
from simplified_tinybert.data.features import Examples
from simplified_tinybert.model.batch import Batch
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.model.cpu_linear import pack_linear_layers
from simplified_tinybert.model.precision import autocast, cast_linear_layers
from simplified_tinybert.model.pretrained import fit_projections, initialise, load_cross_encoder, save_cross_encoder
from simplified_tinybert.ranking import scoring
from simplified_tinybert.tokenization.pairs import CachedTokenizer, tokenize
from simplified_tinybert.tokenization.tokenizer_files import load_vocabulary
from simplified_tinybert.training.batches import epoch_batches
from simplified_tinybert.training.objective import ObjectiveSettings, objective, stage_weights, total_loss
from simplified_tinybert.training.optimizer import BertAdam, decay_groups
from simplified_tinybert.training.settings import TrainingSettings

TIMED_RERANKER = """
import sys, time
start = time.perf_counter()
import reranker
spent = {"imports": time.perf_counter() - start, "model": 0.0, "scoring": 0.0}
def timed(name, function):
    def call(*args, **kwargs):
        begin = time.perf_counter()
        result = function(*args, **kwargs)
        spent[name] += time.perf_counter() - begin
        return result
    return call
reranker.scoring.load_scorer = timed("model", reranker.scoring.load_scorer)
reranker.write_scores = timed("scoring", reranker.write_scores)
reranker.main()
import json
print(json.dumps(spent | {"total": time.perf_counter() - start}))
"""


def vocabulary_directory(directory: Path, vocab_file: Path) -> Path:
    directory.mkdir()
    shutil.copyfile(vocab_file, directory / "vocab.txt")
    return directory


def make_model(directory: Path, shape: str, vocabulary: Path, examples: Examples | None = None, dropout: float = 0.1,
               teacher_size: int | None = None) -> Path:
    """Save a model with random weights as large as trained ones. `shape`: LAYERSxHIDDEN, such as 3x384.

    With `examples`, logits on them have mean 0 and standard deviation 1, so that scores differ as a trained model's.
    With `teacher_size`, projections to the teacher's hidden size are added.
    """
    layers, hidden_size = map(int, shape.split("x"))
    model = CrossEncoder(BertConfig(
        vocab_size=len(load_vocabulary(vocabulary).token_ids), hidden_size=hidden_size, num_hidden_layers=layers,
        num_attention_heads=12, intermediate_size=4 * hidden_size, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout))
    generator = torch.Generator().manual_seed(layers * hidden_size)
    for name, parameter in model.named_parameters():
        if "LayerNorm" not in name:
            initialise(parameter, 0.04, generator)
    if examples:
        standardise_logits(model.eval(), examples.batch(np.arange(min(len(examples), 16))))
    if teacher_size:
        fit_projections(model, teacher_size, torch.Generator().manual_seed(0))
    save_cross_encoder(model, directory, vocabulary, lower_case=True)
    return directory


@torch.no_grad()
def standardise_logits(model: CrossEncoder, batch: Batch) -> None:
    logits = model(batch).logits
    model.classifier.weight /= logits.std(dim=0)[:, None]
    model.classifier.bias.copy_((model.classifier.bias - logits.mean(dim=0)) / logits.std(dim=0))


def load_model(directory: Path, device: torch.device) -> CrossEncoder:
    return load_cross_encoder(directory)[0].to(device)


def load_scorer(directory: Path, device: torch.device, dtype: torch.dtype | None = None, int8: bool = False) \
        -> CrossEncoder:
    """Load a model and prepare it for scoring as reranker.py does."""
    model = load_model(directory, device)
    scoring.prepare(model, dtype, int8)
    return model


def tokenizer(directory: Path) -> Callable[[list[str], int], Examples]:
    """Return a function (lines of pairs, max_seq_length) → examples that works like tokenize_to_features.py."""
    vocabulary = load_vocabulary(directory)
    return lambda lines, length: tokenize(lines, CachedTokenizer(vocabulary, length))


def score(model: CrossEncoder, examples: Examples, batch_tokens: int | None = None) -> np.ndarray:
    """Return probabilities of relevance (N), as reranker.py computes them; None: in batches of its default size."""
    limits = scoring.BatchLimits(batch_tokens or scoring.BATCH_TOKENS[model.classifier.weight.device.type])
    chunk = scoring.score_chunk(model, examples, scoring.token_batches(examples.lengths, limits))
    return scoring.relevance(chunk.logits(), "probability")


def start_up(model_dir: Path, features_file: Path, scores_file: Path, device: torch.device) -> dict[str, float]:
    """Run reranker.py in a separate process. Return the seconds of each part."""
    flags = ["--model_dir", model_dir, "--features_file", features_file, "--output_scores_file", scores_file,
             "--device", str(device)]
    done = subprocess.run([sys.executable, "-c", TIMED_RERANKER, *map(str, flags)], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    return json.loads(done.stdout)


class Step:
    """Optimizer steps with distill.py's simplified objective."""

    def __init__(self, student: CrossEncoder, teacher: CrossEncoder, padding: str, dtype: torch.dtype | None = None,
                 rate: float = 5e-5):
        self.student, self.teacher, self.dtype = student, teacher.requires_grad_(False), dtype
        if dtype:
            cast_linear_layers(teacher, dtype)
        else:
            pack_linear_layers(teacher)
        self.settings = ObjectiveSettings(weights=stage_weights("simplified")[0], padding=padding)
        self.optimizer = BertAdam(decay_groups(student.named_parameters(), 0.01), rate, lambda step: 1.0)

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        with autocast(batch.input_ids.device, self.dtype):
            terms = objective(self.student, self.teacher, batch, self.settings)
            return total_loss(terms, self.settings.weights)

    def __call__(self, batch: Batch) -> None:
        self.losses(batch)["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def bucketed_batches(examples: Examples, batch_size: int) -> list[np.ndarray]:
    """Return batches of pairs of similar length, as in distill.py --padding masked."""
    settings = TrainingSettings(batch_size=batch_size, max_seq_length=0, seed=0, group_by_length=True)
    return epoch_batches(examples.lengths, settings, epoch=0)


def tokenize_command(set_name: str, pairs: Path, output: Path, vocabulary: Path, max_seq_length: int) -> list[object]:
    """Script and arguments of tokenize_to_features.py."""
    return [ROOT / "tokenize_to_features.py", "--set_name", set_name, "--raw_data_file", pairs,
            "--output_features_file", output, "--bert_model_dir", vocabulary, "--max_seq_length", max_seq_length]
