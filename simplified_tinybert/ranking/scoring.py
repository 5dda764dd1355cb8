"""Scoring pairs: batches of similar length, logits in input order, the score of a pair; by one process or several."""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from tqdm import tqdm

from simplified_tinybert.common.device import read_ahead
from simplified_tinybert.common.files import UserError
from simplified_tinybert.common.processes import Processes
from simplified_tinybert.data.features import Examples, FeatureSummary, read_chunks
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.model.cpu_linear import pack_linear_layers, quantize_linear_layers
from simplified_tinybert.model.precision import to_half

BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}     # a CPU is fastest while a batch's activations stay in its cache


def prepare(model: CrossEncoder, dtype: torch.dtype | None, int8: bool) -> None:
    """Bring the model, in place, into the form that scores fastest on its device in the precision asked for."""
    if dtype:
        to_half(model, dtype)
    elif int8:
        quantize_linear_layers(model)
    else:
        pack_linear_layers(model)


@dataclass(frozen=True)
class BatchLimits:
    """At most so many positions of a batch, padding included, and so many pairs (None: any number)."""
    tokens: int
    pairs: int | None = None

    @classmethod
    def of(cls, device: torch.device) -> "BatchLimits":
        """What is fastest on a device."""
        return cls(BATCH_TOKENS[device.type])


def token_batches(lengths: np.ndarray, limits: BatchLimits) -> Iterator[np.ndarray]:
    """Indices of each batch: longest pairs first."""
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    start = 0
    while start < len(order):
        size = max(1, limits.tokens // int(lengths[order[start]]))
        size = min(size, limits.pairs) if limits.pairs else size
        yield order[start:start + size]
        start += size


def relevance(logits: np.ndarray, score: str) -> np.ndarray:
    """Scores (N) in float64 from float32 logits (N, 2)."""
    logits = logits.astype(np.float64)
    log_odds = logits[:, 1] - logits[:, 0]
    return log_odds if score == "log_odds" else np.exp(-np.logaddexp(0.0, -log_odds))


def score_chunk(model: CrossEncoder, chunk: Examples, batches: Iterable[np.ndarray], device: torch.device,
                progress: tqdm) -> np.ndarray:
    """Logits (N, C) of the pairs of a chunk in float32, in input order; zeros for those in none of the batches."""
    logits = np.zeros((len(chunk), model.config.num_labels), dtype=np.float32)
    pending = []                                          # results stay on the device until the chunk is through
    with torch.inference_mode():
        for indices in batches:
            pending.append((indices, model(chunk.batch(indices).to(device)).logits.float()))
            progress.update(len(indices))
    for indices, values in pending:
        logits[indices] = values.cpu().numpy()
    return logits


def scored_chunks(model: CrossEncoder, features: FeatureSummary, limits: BatchLimits, processes: Processes,
                  done: int = 0, passing: bool = False) -> Iterator[tuple[Examples, np.ndarray]]:
    """Yield the chunks of feature files with their logits (N, C), after the first `done` pairs.

    Every process gets all logits, whoever computed them. A `passing` progress bar leaves nothing on the terminal.

    Batches, which follow from the lengths alone, are dealt out in turn. The processes exchange their logits after as
    many chunks as there are processes, so that they seldom wait for each other.
    """
    chunks = read_ahead(chunk for path in features.paths for chunk in read_chunks(path))
    seen, turns, device = 0, cycle(range(processes.count)), model.classifier.weight.device
    while seen < done:
        seen += len(next(chunks))
    with tqdm(total=features.examples, initial=done, desc="scoring", unit=" pairs", leave=not passing,
              disable=not processes.first) as progress:
        while window := list(islice(chunks, processes.count)):
            logits = []
            for chunk in window:
                batches = token_batches(chunk.lengths, limits)
                mine = [indices for indices in batches if next(turns) == processes.rank]
                logits.append(score_chunk(model, chunk, mine, device, progress))
            merged = [processes.merge(own) for own in logits]
            for chunk, values in zip(window, merged):
                yield chunk, check_finite(chunk, values)
            seen += sum(map(len, window))
            progress.update(seen - progress.n)          # what the other processes computed


def check_finite(chunk: Examples, logits: np.ndarray) -> np.ndarray:
    """The logits. Raises UserError if there is one that is not a number."""
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        raise UserError(f"the model's logits of {chunk.ids[int(bad.argmax())]} are not numbers; try --bf16 in place of "
                        f"--fp16, or neither; else the model's weights are broken")
    return logits
