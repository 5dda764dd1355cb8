"""Score the same pairs with the same weights: as the original, by sentence-transformers, by our code. Not a command."""
import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import ours, peer_backends, samples
from benchmarks.original import RERANK_BATCH, RERANK_LENGTH, OriginalBert, original_scores
from simplified_tinybert.common.files import UserError, say
from simplified_tinybert.data.features import Examples
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.model.precision import native_bf16
from simplified_tinybert.ranking.speed import seconds

ORIGINAL, PEER, PEER_BF16 = "original", "sentence-transformers", "sentence-transformers, bf16"
OURS, OURS_TEXTS, OURS_BF16, OURS_INT8 = "ours", "ours, from texts", "ours, bf16", "ours, int8"
TRIAL_PAIRS = 2048      # enough for choosing sentence-transformers' batch size
ALL = (ORIGINAL, PEER, PEER_BF16, *peer_backends.WAYS, OURS, OURS_TEXTS, OURS_BF16, OURS_INT8)


@dataclass
class PeerSettings:
    """Batch sizes to try with sentence-transformers, and the interpreter of an environment with its backends."""
    batch_sizes: list[int]
    backends_python: Path | None = None


@dataclass
class Sample:
    """The same pairs as lines of text and as features."""
    lines: list[str]
    examples: Examples
    max_length: int

    def texts(self) -> list[tuple[str, str]]:
        return [tuple(line.split("\t")[1:3]) for line in self.lines]

    def part(self, size: int) -> "Sample":
        """Return `size` pairs with the same distribution of lengths, in random order."""
        chosen = samples.evenly(self.examples.lengths, min(size, len(self.lines)))
        return Sample([self.lines[index] for index in chosen], self.examples.take(chosen), self.max_length)


def real_sample(raw_data_file: Path | None, vocabulary: Path, size: int) -> Sample:
    """Return `size` pairs with the distribution of lengths of twenty times as many."""
    lines = samples.read_pairs(raw_data_file, 20 * size) if raw_data_file else \
        list(samples.Texts().pair_lines(20 * size, repeats=1))
    return Sample(lines, ours.tokenizer(vocabulary)(lines, RERANK_LENGTH), RERANK_LENGTH).part(size)


def equal_sample(pairs: Sample, vocabulary: Path, length: int, size: int) -> Sample:
    """Return `size` pairs of exactly `length` tokens. Each passage is several of `pairs`, joined."""
    texts = pairs.texts()
    lines = []
    for number in range(size):
        passage = " ".join(texts[(number + step) % len(texts)][1] for step in range(2 + length // 50))
        lines.append(f"q0#D{number}_0\t{texts[number % len(texts)][0]}\t{passage}")
    examples = ours.tokenizer(vocabulary)(lines, length)
    full = np.flatnonzero(examples.lengths == length)
    return Sample([lines[index] for index in full], examples.take(full), length)


class Backends:
    """A process that runs peer_backends.py. It ends when this object is deleted."""

    def __init__(self, python: Path, model: Path, texts: list[tuple[str, str]], max_length: int,
                 batch_sizes: list[int]):
        self.directory = tempfile.TemporaryDirectory()
        settings = Path(self.directory.name) / "settings.json"
        settings.write_text(json.dumps({"model": str(model), "texts": texts, "max_length": max_length,
                                        "batch_sizes": batch_sizes}), encoding="utf-8")
        self.log = Path(self.directory.name) / "log.txt"
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen([python, peer_backends.__file__, settings], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=log, text=True)

    def score(self, way: str) -> np.ndarray:
        """Return the probability of relevance of each pair. Raises UserError with the end of the log."""
        if self.process.poll() is None:
            print(way, file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            log = self.log.read_text(encoding="utf-8", errors="replace")
            raise UserError(f"--backends_python {self.process.args[0]}: {way} failed\n{log[-2000:]}")
        return np.array(json.loads(line))

    def __del__(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.directory.cleanup()


def ways(directory: Path, sample: Sample, device: torch.device, peer: PeerSettings,
         names: tuple[str, ...]) -> dict[str, Callable[[], np.ndarray]]:
    """Return for each of the named implementations a function that scores all pairs of the sample."""
    original, length = OriginalBert(directory).eval().to(device), max(RERANK_LENGTH, sample.max_length)
    batches = [sample.examples.batch(np.arange(start, min(start + RERANK_BATCH, len(sample.examples))), length)
               for start in range(0, len(sample.examples), RERANK_BATCH)]
    models, tokenize = our_scorers(directory, device), ours.tokenizer(directory)
    scorers = {ORIGINAL: lambda: original_scores(original, [batch.to(device) for batch in batches]).numpy(),
               **sentence_transformers(directory, sample, device, peer.batch_sizes),
               OURS_TEXTS: lambda: ours.score(models[OURS], tokenize(sample.lines, sample.max_length)),
               **{way: partial(ours.score, model, sample.examples) for way, model in models.items()}}
    if device.type == "cpu" and peer.backends_python and set(names) & set(peer_backends.WAYS):
        backends = Backends(peer.backends_python, directory, sample.texts(), sample.max_length,
                            useful_sizes(peer.batch_sizes, sample))
        scorers |= {way: partial(backends.score, way) for way in peer_backends.WAYS}
    return {name: scorers[name] for name in names if name in scorers}


def our_scorers(directory: Path, device: torch.device) -> dict[str, CrossEncoder]:
    """The model in each precision of reranker.py that the device has: float32, bfloat16, on CPUs also 8 bits."""
    models = {OURS: ours.load_scorer(directory, device)}
    if native_bf16(device) is not False:                # emulation takes many times as long
        models[OURS_BF16] = ours.load_scorer(directory, device, torch.bfloat16)
    if device.type == "cpu":
        try:
            models[OURS_INT8] = ours.load_scorer(directory, device, int8=True)
        except UserError as error:
            say(f"{error}: left out")
    return models


def useful_sizes(batch_sizes: list[int], sample: Sample) -> list[int]:
    """The batch sizes that are not larger than the sample; at least one."""
    return [size for size in batch_sizes if size <= len(sample.lines)] or batch_sizes[:1]


def sentence_transformers(directory: Path, sample: Sample, device: torch.device,
                          batch_sizes: list[int]) -> dict[str, Callable[[], np.ndarray]]:
    """Return CrossEncoder.predict in float32 and bfloat16, or nothing if sentence-transformers is not installed.

    Both use the batch size that is fastest in float32 on the first pairs of this sample.
    """
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        say("sentence-transformers is not installed: left out")
        return {}
    models = {name: CrossEncoder(str(directory), device=str(device), max_length=sample.max_length,
                                 model_kwargs={"dtype": dtype})
              for name, dtype in ((PEER, torch.float32), (PEER_BF16, torch.bfloat16))
              if dtype == torch.float32 or native_bf16(device) is not False}
    texts = sample.texts()

    def predict(name: str, size: int, pairs: int | None = None) -> np.ndarray:
        return models[name].predict(texts[:pairs], batch_size=size, apply_softmax=True, show_progress_bar=False)[:, 1]

    times = {size: seconds(lambda: predict(PEER, size, TRIAL_PAIRS), device)  # noqa: B023
             for size in useful_sizes(batch_sizes, sample)}
    best = min(times, key=times.get)
    say("  sentence-transformers, batch size: " + ", ".join(f"{size} {spent:.2f} s" for size, spent in times.items()))
    return {name: lambda name=name: predict(name, best) for name in models}
