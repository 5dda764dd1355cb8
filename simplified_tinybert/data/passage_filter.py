"""Score the passages of relevant documents with a cross-encoder, so that sampling.py can select the relevant ones."""
from itertools import chain

import numpy as np

from simplified_tinybert.common.device import keep_freed_memory, select_device
from simplified_tinybert.common.files import Problems
from simplified_tinybert.data.tokenization import CachedTokenizer, tokenize, words_suffice
from simplified_tinybert.model.configuration import read_config
from simplified_tinybert.model.hub import find_model
from simplified_tinybert.model.precision import select_precision, warn_if_emulated
from simplified_tinybert.model.tokenizer_files import load_vocabulary
from simplified_tinybert.model.weights import weights_checksum
from simplified_tinybert.ranking.scoring import load_scorer, relevance, score_all


class PassageFilter:
    """Scores query-passage pairs with a cross-encoder. Input errors are added to `problems`."""

    def __init__(self, model: str, max_seq_length: int, device: str, bf16: bool, problems: Problems):
        self.max_seq_length, self.tokenizer = max_seq_length, None
        with problems.collect():
            chosen = select_device(device)
            dtype = select_precision(False, bf16, chosen, problems)
            self.directory = find_model(model)
            config, self.vocabulary = read_config(self.directory), load_vocabulary(self.directory)
            if not 8 <= max_seq_length <= config.max_position_embeddings:
                problems.add(f"--max_seq_length {max_seq_length}: expected 8 to {config.max_position_embeddings}, the "
                             f"maximum of {self.directory}")
            if not problems.count:                      # do not spend seconds on loading otherwise
                warn_if_emulated(dtype, chosen)
                keep_freed_memory(chosen)
                self.model, _ = load_scorer(self.directory, config, chosen, dtype, label="filter")

    def checksum(self) -> str:
        return weights_checksum(self.directory)

    def probabilities(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """Return the probability of relevance (N), float64, of (query, passage) pairs without tabs or line ends."""
        if not self.tokenizer:                          # it is created here because it needs sample texts
            by_words = words_suffice(self.vocabulary, chain.from_iterable(pairs))
            self.tokenizer = CachedTokenizer(self.vocabulary, self.max_seq_length, by_words)
        lines = [f"{number}\t{query}\t{passage}" for number, (query, passage) in enumerate(pairs)]
        return relevance(score_all(self.model, tokenize(lines, self.tokenizer)), "probability")
