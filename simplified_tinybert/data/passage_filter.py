"""Score the passages of relevant documents with a cross-encoder, so that sampling.py can select the relevant ones."""
import argparse
from itertools import chain

import numpy as np

from simplified_tinybert.common.device import explain_full_memory, prepare_device, select_device
from simplified_tinybert.common.files import Problems
from simplified_tinybert.common.processes import Processes
from simplified_tinybert.model.configuration import read_config
from simplified_tinybert.model.hub import find_model
from simplified_tinybert.model.precision import select_precision, warn_if_slow
from simplified_tinybert.model.weights import model_checksum
from simplified_tinybert.ranking.scoring import load_scorer, relevance, score_all
from simplified_tinybert.tokenization.pairs import CachedTokenizer, tokenize, words_suffice
from simplified_tinybert.tokenization.tokenizer_files import load_vocabulary

ADVICE = "filter the passages with --device cpu"        # if the memory is full


class PassageFilter:
    """Scores query-passage pairs with a cross-encoder, as the arguments say. Input errors are added to `problems`.

    `processes` may be replaced by those of a job; each of them then scores a part of the pairs and gets all results.
    """

    def __init__(self, args: argparse.Namespace, problems: Problems):
        self.max_seq_length, self.tokenizer, self.processes = args.max_seq_length, None, Processes()
        with problems.collect():
            self.device = device = select_device(args.device)
            dtype = select_precision(args, device, problems)
            self.directory = find_model(args.filter_model)
            config, self.vocabulary = read_config(self.directory), load_vocabulary(self.directory)
            limit = config.max_position_embeddings
            if not 8 <= self.max_seq_length <= limit:
                problems.add(f"--max_seq_length {self.max_seq_length}: expected 8 to {limit}, the maximum of "
                             f"{self.directory}")
            if not problems.count:                      # do not spend seconds on loading otherwise
                with explain_full_memory(ADVICE):
                    prepare_device(device)
                    warn_if_slow(dtype, device)
                    self.model, _ = load_scorer(self.directory, config, device, dtype, label="filter")

    def checksum(self) -> str:
        return model_checksum(self.directory)

    def probabilities(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """Return the probability of relevance (N), float64, of (query, passage) pairs without tabs or line ends."""
        if not self.tokenizer:                          # it is created here because it needs sample texts
            by_words = words_suffice(self.vocabulary, chain.from_iterable(pairs))
            self.tokenizer = CachedTokenizer(self.vocabulary, self.max_seq_length, by_words)
        rank, count = self.processes.rank, self.processes.count
        lines = [f"{number}\t{query}\t{passage}" for number, (query, passage) in enumerate(pairs[rank::count])]
        logits = np.zeros((len(pairs), self.model.config.num_labels), np.float32)
        if lines:
            with explain_full_memory(ADVICE):
                logits[rank::count] = score_all(self.model, tokenize(lines, self.tokenizer))
        return relevance(self.processes.merge(logits), "probability")
