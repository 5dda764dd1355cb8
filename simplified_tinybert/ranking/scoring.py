"""Score pairs in one process or several: batches of similar length, logits in input order, relevance scores."""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import BertConfig

from simplified_tinybert.common.device import padded_length, read_ahead
from simplified_tinybert.common.files import UserError, say
from simplified_tinybert.common.processes import Processes
from simplified_tinybert.data.features import Examples, FeatureSummary, read_chunks
from simplified_tinybert.model.bert import CrossEncoder, count_parameters, describe
from simplified_tinybert.model.cpu_linear import pack_linear_layers, quantize_linear_layers
from simplified_tinybert.model.gpu_scoring import can_pack, fuse_gelu
from simplified_tinybert.model.precision import has_amx, to_half
from simplified_tinybert.model.pretrained import load_ranker

BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}     # a CPU is fastest while a batch's activations fit its cache
AHEAD = {"cpu": 0, "cuda": 1}                   # windows that a GPU may compute while an earlier one is written


def load_scorer(directory: Path, config: BertConfig, device: torch.device, dtype: torch.dtype | None = None,
                int8: bool = False, label: str = "model") -> tuple[CrossEncoder, int]:
    """Load a model, prepared for scoring, and return it with its number of parameters. Raises UserError.

    Prints a line that starts with `label`, the loader's notes, and how matrix products are computed.
    """
    model, notes = load_ranker(directory, config)
    say(f"{label:<12} {describe(model)}")
    for note in notes:
        say(f"note         {note}")
    parameters = count_parameters(model)
    products = prepare(model.to(device), dtype, int8)
    say(f"products     {products}" + (f" ({torch.backends.cpu.get_cpu_capability()})" if device.type == "cpu" else ""))
    return model, parameters


def prepare(model: CrossEncoder, dtype: torch.dtype | None, int8: bool) -> str:
    """Convert the model, in place, to the form that scores fastest in this precision. dtype=None: float32.

    Returns a description of this form.
    """
    if dtype:
        to_half(model, dtype)
        model.packs_batches = can_pack(model)
        parts = [str(dtype).removeprefix("torch.")]
        parts += ["GELU fused with the products"] * fuse_gelu(model) + ["batches without padding"] * model.packs_batches
        return ", ".join(parts)
    if int8:
        bits = quantize_linear_layers(model)
        return "8-bit integers" + ("; weights have 7 bits, as 8-bit sums overflow on this CPU" if bits == 7 else "")
    if pack_linear_layers(model):
        return "float32, with weights packed for oneDNN" + (
            "; --bf16 takes about half the time on this CPU" if has_amx() else "")
    return "float32" if torch.get_float32_matmul_precision() == "highest" else "TF32"


class BatchLimits(NamedTuple):
    """Limits of a batch: tokens with padding (before a GPU's lengths are rounded up), and pairs (None: no limit)."""
    tokens: int
    pairs: int | None = None

    @classmethod
    def of(cls, device: torch.device) -> "BatchLimits":
        """Return the fastest limits for a device."""
        return cls(BATCH_TOKENS[device.type])


def token_batches(lengths: np.ndarray, limits: BatchLimits) -> Iterator[np.ndarray]:
    """Yield the indices of each batch, longest pairs first."""
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    start = 0
    while start < len(order):
        size = max(1, limits.tokens // int(lengths[order[start]]))
        size = min(size, limits.pairs) if limits.pairs else size
        yield order[start:start + size]
        start += size


def relevance(logits: np.ndarray, score: str) -> np.ndarray:
    """Convert float32 logits (N, 2) to scores (N) in float64: "log_odds" or "probability"."""
    logits = logits.astype(np.float64)
    log_odds = logits[:, 1] - logits[:, 0]
    return log_odds if score == "log_odds" else np.exp(-np.logaddexp(0.0, -log_odds))


@dataclass
class ScoredChunk:
    """A chunk and its logits, batch by batch. A GPU may still be computing them and copying them to the CPU."""
    chunk: Examples
    batches: list[tuple[np.ndarray, Tensor]]            # indices (B), logits (B, C) in float32 on the CPU
    classes: int
    copied: torch.cuda.Event | None = None              # when a GPU has copied them all

    def logits(self) -> np.ndarray:
        """Return the logits (N, C) in input order; zeros for pairs that are in no batch.

        Waits for a GPU, but only until this chunk is finished, not for chunks that were given to it later.
        """
        if self.copied:
            self.copied.synchronize()
        logits = np.zeros((len(self.chunk), self.classes), np.float32)
        for indices, values in self.batches:
            logits[indices] = values.numpy()
        return logits


def score_chunk(model: CrossEncoder, chunk: Examples, batches: Iterable[np.ndarray],
                progress: tqdm | None = None) -> ScoredChunk:
    """Score the batches of a chunk. Does not wait for a GPU."""
    device, limit = model.classifier.weight.device, model.config.max_position_embeddings
    scored = ScoredChunk(chunk, [], model.config.num_labels)
    with torch.inference_mode():
        for indices in batches:
            if model.packs_batches:
                batch = chunk.packed_batch(indices, device)
            else:
                length = padded_length(int(chunk.lengths[indices].max()), device, limit)
                batch = chunk.batch(indices, length, device)
            logits = model(batch).logits.float()
            scored.batches.append((indices, logits.to("cpu", non_blocking=True)))
            if progress is not None:
                progress.update(len(indices))
    if device.type == "cuda":
        scored.copied = torch.cuda.Event()
        scored.copied.record(torch.cuda.current_stream(device))
    return scored


def score_all(model: CrossEncoder, pairs: Examples) -> np.ndarray:
    """Return the logits (N, C) of pairs in memory, in batches of the fastest size."""
    batches = token_batches(pairs.lengths, BatchLimits.of(model.classifier.weight.device))
    return check_finite(pairs, score_chunk(model, pairs, batches).logits())


def scored_chunks(model: CrossEncoder, features: FeatureSummary, limits: BatchLimits, processes: Processes,
                  done: int = 0, passing: bool = False) -> Iterator[tuple[Examples, np.ndarray]]:
    """Yield the chunks of feature files with their logits (N, C), skipping the first `done` pairs.

    Every process yields all logits. The batches depend only on the lengths, and the processes take turns computing
    them. With n processes, logits are exchanged after every n chunks, so that processes rarely wait for each other.
    While a GPU computes, the caller already processes the previous chunks. A `passing` progress bar disappears at the
    end.
    """
    chunks = read_ahead(chunk for path in features.paths for chunk in read_chunks(path))
    seen, turns, ahead = 0, cycle(range(processes.count)), AHEAD[model.classifier.weight.device.type]
    while seen < done:
        seen += len(next(chunks))
    with tqdm(total=features.examples, initial=done, desc="scoring", unit=" pairs", leave=not passing,
              disable=not processes.first) as progress:
        in_work: list[list[ScoredChunk]] = []           # windows of chunks
        while (window := list(islice(chunks, processes.count))) or in_work:
            if window:
                in_work.append([])
            for chunk in window:
                batches = token_batches(chunk.lengths, limits)
                own_batches = [indices for indices in batches if next(turns) == processes.rank]
                in_work[-1].append(score_chunk(model, chunk, own_batches, progress))
            if window and len(in_work) <= ahead:
                continue
            scored = in_work.pop(0)
            for own, values in zip(scored, [processes.merge(own.logits()) for own in scored], strict=True):
                yield own.chunk, check_finite(own.chunk, values)
            seen += sum(len(own.chunk) for own in scored)
            progress.update(max(0, seen - progress.n))  # pairs of the other processes


def check_finite(chunk: Examples, logits: np.ndarray) -> np.ndarray:
    """Return the logits. Raises UserError if one is NaN or infinite."""
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        raise UserError(f"the model's logits of {chunk.ids[int(bad.argmax())]} are NaN or infinite; with --fp16, try "
                        f"--bf16 or neither; otherwise the model's weights are damaged")
    return logits
