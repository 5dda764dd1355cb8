"""The order of the examples: which of them form each batch of an epoch."""
from collections.abc import Collection
from hashlib import blake2b

import numpy as np

from simplified_tinybert.common.files import UserError
from simplified_tinybert.data.features import Examples
from simplified_tinybert.training.settings import TrainingSettings

BUCKET_BATCHES = 64             # batches per bucket when examples are grouped by length


def epoch_batches(lengths: np.ndarray, settings: TrainingSettings, epoch: int,
                  queries: np.ndarray | None = None) -> list[np.ndarray]:
    """Return the indices of each batch of an epoch. They depend only on seed and epoch. The last batch may be smaller.

    With `group_by_length`, buckets of BUCKET_BATCHES batches are sorted by length before they are cut into batches,
    and the batches of the epoch are shuffled again. With `queries`, batches hold whole queries instead.
    """
    random, batch_size = np.random.default_rng([settings.seed, epoch]), settings.batch_size
    if queries is not None:
        return query_batches(queries, settings.group_by_query, batch_size // settings.group_by_query, random)
    order = random.permutation(len(lengths))
    if settings.group_by_length:
        size = BUCKET_BATCHES * batch_size
        buckets = [order[start:start + size] for start in range(0, len(order), size)]
        order = np.concatenate([bucket[np.argsort(lengths[bucket], kind="stable")] for bucket in buckets])
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    if settings.group_by_length:
        batches = [batches[number] for number in random.permutation(len(batches))]
    return batches


def query_batches(queries: np.ndarray, examples_of_each: int, per_batch: int,
                  random: np.random.Generator) -> list[np.ndarray]:
    """Return batches of `per_batch` queries, with up to `examples_of_each` examples of each, drawn at random."""
    count = int(queries.max()) + 1
    order = np.lexsort((random.random(len(queries)), queries))              # by query, at random within a query
    first = np.searchsorted(queries[order], np.arange(count))
    drawn = order[np.arange(len(order)) - first[queries[order]] < examples_of_each]
    place = random.permutation(count)                                       # of each query in the epoch
    drawn = drawn[np.argsort(place[queries[drawn]], kind="stable")]
    ends = np.searchsorted(place[queries[drawn]], np.arange(per_batch, count, per_batch))
    return np.split(drawn, ends)


def number_queries(examples: Examples, max_seq_length: int) -> np.ndarray:
    """Return the number of each example's query (N), from 0; a query is known by its first tokens.

    These are the tokens that truncation to `max_seq_length` always keeps: half of those that are not special.
    """
    starts = examples.offsets[:-1] + 1                                      # after [CLS]
    ends = np.minimum(starts + examples.query_lengths - 2, starts + (max_seq_length - 3) // 2)
    digests = (blake2b(examples.tokens[start:end].tobytes(), digest_size=8).digest()
               for start, end in zip(starts, ends, strict=True))            # hash() differs from process to process
    values = np.frombuffer(b"".join(digests), np.int64)
    return np.unique(values, return_inverse=True)[1]


def check_queries(queries: np.ndarray, labels: np.ndarray, weights: Collection[str]) -> None:
    """Raise UserError if a ranking term would never have anything to compare."""
    relevant, others = (np.bincount(queries, weights=labels == label) for label in (1, 0))
    if "margin" in weights and not (relevant * others).any():
        raise UserError("--loss_weights margin: no query has examples with both labels, so there are no margins; "
                        "prepare examples with passages of both kinds for each query")
    if "listwise" in weights and np.bincount(queries).max() < 2:
        raise UserError("--loss_weights listwise: every query has a single example, so there is nothing to compare")
