"""Ways to score the same pairs with the same weights: the original's, sentence-transformers', ours. Not a command."""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import common, ours, samples
from benchmarks.original import RERANK_BATCH, RERANK_WIDTH, OriginalBert, original_scores
from simplified_tinybert.features import Examples
from simplified_tinybert.files import say

ORIGINAL, PEER, PEER_BF16 = "original", "sentence-transformers", "sentence-transformers, bf16"
OURS, OURS_TEXTS, OURS_BF16 = "ours", "ours, from texts", "ours, bf16"


@dataclass
class Sample:
    """The same pairs as lines of text and as features."""
    lines: list[str]
    examples: Examples
    width: int

    def texts(self) -> list[tuple[str, str]]:
        return [tuple(line.split("\t")[1:3]) for line in self.lines]

    def part(self, size: int) -> "Sample":
        """`size` of the pairs, as long as all of them are, in random order."""
        chosen = samples.evenly(self.examples.lengths, min(size, len(self.lines)))
        return Sample([self.lines[index] for index in chosen], ours.subset(self.examples, chosen), self.width)


def real_sample(raw_data_file: Path | None, vocabulary: Path, size: int) -> Sample:
    """`size` pairs that are as long as twenty times as many are."""
    lines = samples.read_pairs(raw_data_file, 20 * size) if raw_data_file else \
        list(samples.Texts().pair_lines(20 * size, repeats=1))
    return Sample(lines, ours.tokenizer(vocabulary)(lines, RERANK_WIDTH), RERANK_WIDTH).part(size)


def equal_sample(pairs: Sample, vocabulary: Path, length: int, size: int) -> Sample:
    """`size` pairs that fill exactly `length` positions: their passages are several of `pairs`, joined."""
    texts = pairs.texts()
    joined = 2 + length // 50
    lines = []
    for number in range(size):
        passage = " ".join(texts[(number + step) % len(texts)][1] for step in range(joined))
        lines.append(f"q0#D{number}_0\t{texts[number % len(texts)][0]}\t{passage}")
    examples = ours.tokenizer(vocabulary)(lines, length)
    full = np.flatnonzero(examples.lengths == length)
    return Sample([lines[index] for index in full], ours.subset(examples, full), length)


def ways(folder: Path, sample: Sample, device: torch.device, batch_sizes: list[int]) -> dict[str, Callable]:
    """Each way as a function without arguments that returns all scores."""
    original, width = OriginalBert(folder).eval().to(device), max(RERANK_WIDTH, sample.width)
    batches = [sample.examples.batch(np.arange(start, min(start + RERANK_BATCH, len(sample.examples))), width)
               for start in range(0, len(sample.examples), RERANK_BATCH)]
    found = {ORIGINAL: lambda: original_scores(original, [batch.to(device) for batch in batches]).numpy()}
    for name, dtype in ((PEER, torch.float32), (PEER_BF16, torch.bfloat16)):
        if predict := peer(folder, sample, device, dtype, batch_sizes):
            found[name] = predict
    model, tokenize = ours.load_model(folder, device), ours.tokenizer(folder)
    found[OURS] = lambda: ours.score(model, sample.examples, device)
    found[OURS_TEXTS] = lambda: ours.score(model, tokenize(sample.lines, sample.width), device)
    found[OURS_BF16] = lambda: ours.score(model, sample.examples, device, torch.bfloat16)
    return found


def peer(folder: Path, sample: Sample, device: torch.device, dtype: torch.dtype,
         batch_sizes: list[int]) -> Callable | None:
    """sentence-transformers with the batch size that is fastest on this sample; None if it is not installed."""
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        say("sentence-transformers is not installed: left out")
        return None
    model = CrossEncoder(str(folder), device=str(device), max_length=sample.width, model_kwargs={"dtype": dtype})
    texts = sample.texts()

    def predict(size: int) -> np.ndarray:
        return model.predict(texts, batch_size=size, apply_softmax=True, show_progress_bar=False)[:, 1]
    predict(batch_sizes[0])
    times = {size: common.seconds(lambda: predict(size), device) for size in batch_sizes}  # noqa: B023
    best = min(times, key=times.get)
    say(f"  sentence-transformers, {dtype}: " + ", ".join(f"{size}: {spent:.2f} s" for size, spent in times.items()))
    return lambda: predict(best)
