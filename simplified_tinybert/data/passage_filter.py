"""Which passages of a relevant document are relevant? A ranker's probabilities, computed in process."""
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import BertConfig

from simplified_tinybert.common.device import keep_freed_memory, select_device
from simplified_tinybert.common.files import Problems, UserError, say
from simplified_tinybert.data.tokenization import CachedTokenizer, tokenize, words_suffice
from simplified_tinybert.model.bert import describe
from simplified_tinybert.model.configuration import read_config
from simplified_tinybert.model.hub import find_model
from simplified_tinybert.model.precision import select_precision, warn_if_emulated
from simplified_tinybert.model.pretrained import load_ranker
from simplified_tinybert.model.tokenizer_files import load_vocabulary
from simplified_tinybert.model.weights import weights_checksum
from simplified_tinybert.ranking.scoring import (
    BatchLimits,
    check_finite,
    prepare,
    relevance,
    score_chunk,
    token_batches,
)


class PassageFilter:
    """Scores passages for queries with a cross-encoder; what is wrong with it or the request is added to `problems`."""

    def __init__(self, model: str, max_seq_length: int, device: str, bf16: bool, problems: Problems):
        self.max_seq_length, self.cutter = max_seq_length, None
        try:
            self.device = select_device(device)
            self.dtype = select_precision(False, bf16, self.device, problems)
            self.directory = find_model(model)
            config, self.vocabulary = read_config(self.directory), load_vocabulary(self.directory)
            check_ranker(self.directory, config, max_seq_length, problems)
            if not problems.count:                      # which are told first, for this takes seconds
                self._load(config)
        except UserError as error:
            problems.add(str(error))

    def _load(self, config: BertConfig) -> None:
        warn_if_emulated(self.dtype, self.device)
        keep_freed_memory(self.device)
        self.model, notes = load_ranker(self.directory, config)
        for note in notes:
            say(f"note         {note}")
        say(f"filter       {describe(self.model)}")
        prepare(self.model.to(self.device), self.dtype, int8=False)

    def checksum(self) -> str:
        return weights_checksum(self.directory)

    def probabilities(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """Probability of relevance (N), float64, of (query, passage) pairs without tabs or line ends."""
        if not self.cutter:                             # which looks at the first texts
            self.cutter = CachedTokenizer(self.vocabulary, self.max_seq_length,
                                      words_suffice(self.vocabulary, chain.from_iterable(pairs)))
        lines = [f"{number}\t{query}\t{passage}" for number, (query, passage) in enumerate(pairs)]
        chunk = tokenize(lines, self.cutter)
        batches = token_batches(chunk.lengths, BatchLimits.of(self.device))
        with tqdm(disable=True) as progress:
            logits = score_chunk(self.model, chunk, batches, self.device, progress)
        return relevance(check_finite(chunk, logits), "probability")


def check_ranker(directory: Path, config: BertConfig, max_seq_length: int, problems: Problems) -> None:
    """Complain of a model that cannot rank passages of this length."""
    if not 8 <= max_seq_length <= config.max_position_embeddings:
        problems.add(f"--max_seq_length {max_seq_length}: expected 8 to {config.max_position_embeddings}, the "
                     f"positions of {directory}")
