"""Validation during training: re-rank dev pairs, score documents by their best passage, compute two measures."""
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from simplified_tinybert.common.files import Problems, check_input_file, warn
from simplified_tinybert.common.processes import Processes
from simplified_tinybert.data.features import Examples, FeatureSummary, read_chunks, summarise
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.model.precision import autocast
from simplified_tinybert.ranking.aggregation import MAX_P
from simplified_tinybert.ranking.measures import Qrels, evaluate, parse_measures
from simplified_tinybert.ranking.scoring import BatchLimits, relevance, score_chunk, scored_chunks, token_batches
from simplified_tinybert.ranking.trec import check_relevant, read_qrels, split_passage_id

SAMPLE_SIZE = 256           # training pairs on which the teacher is checked


@dataclass(frozen=True)
class DevSet:
    """Feature files of dev pairs, and the judgements of their queries."""
    summary: FeatureSummary
    qrels: Qrels

    def checksums(self) -> list[str]:
        return [self.summary.checksum, hashlib.sha256(repr(self.qrels).encode()).hexdigest()]

    def measures(self, student: CrossEncoder, device: torch.device, dtype: torch.dtype | None,
                 processes: Processes) -> dict[str, float]:
        """Return nDCG@10 and MRR@10 over the judged queries, in every process."""
        was_training, run = student.training, {}       # run: query id → document id → score
        student.eval()
        with autocast(device, dtype):
            for chunk, logits in scored_chunks(student, self.summary, BatchLimits.of(device), processes, passing=True):
                for pair_id, score in zip(chunk.ids, relevance(logits, "log_odds").tolist()):
                    query_id, _, passage_id = pair_id.partition("#")
                    document_id, number = split_passage_id(passage_id)
                    documents = run.setdefault(query_id, {})
                    documents[document_id] = MAX_P.update(documents.get(document_id), score, number)
        student.train(was_training)
        evaluation = evaluate(self.qrels, run, parse_measures(["nDCG@10"], 1, Problems()), level=1, complete=False)
        return {name: evaluation.results[name].average for name in ("nDCG@10", "MRR@10")}


def sample_of(examples: Examples) -> np.ndarray:
    """Return the indices of evenly spaced examples."""
    return np.unique(np.linspace(0, len(examples) - 1, SAMPLE_SIZE, dtype=np.int64))


def scores_of(teacher: CrossEncoder, examples: Examples, sample: np.ndarray, device: torch.device,
              dtype: torch.dtype | None) -> np.ndarray:
    """Return the teacher's log-odds for the examples of the sample."""
    batches = (sample[indices] for indices in token_batches(examples.lengths[sample], BatchLimits.of(device)))
    with autocast(device, dtype):
        return relevance(score_chunk(teacher, examples, batches).logits()[sample], "log_odds")


def warn_of_chance(scores: np.ndarray, labels: np.ndarray) -> None:
    """Warn, before hours of training, if the teacher does not score relevant pairs above the others in a sample."""
    area, error = area_under_curve(scores, labels == 1)
    if area < 0.5 + 1.645 * error:                      # 0.5 is chance; one-sided test at 5 %
        worse = "worse than chance: are its classes or the labels swapped?" if area < 0.5 - 1.645 * error else \
            "no better than chance: was it fine-tuned for ranking, on texts like these?"
        warn(f"the teacher scores a relevant pair above a non-relevant one in {100 * area:.0f} % of the cases (in a "
             f"sample of {len(scores)} training pairs), {worse}")


def area_under_curve(scores: np.ndarray, relevant: np.ndarray) -> tuple[float, float]:
    """Return the area under the ROC curve, and its standard error for random scores; (1, 0) if all have one label."""
    above, below = scores[relevant][:, None], scores[~relevant]
    if not above.size or not below.size:
        return 1.0, 0.0
    area = float((above > below).mean() + 0.5 * (above == below).mean())
    return area, math.sqrt((len(scores) + 1) / (12 * above.size * below.size))


def find_dev_set(features: list[Path] | None, qrels_file: Path | None, problems: Problems) -> DevSet | None:
    """Read the dev set of --dev_features_file and --dev_qrels_file, if given."""
    if not features and not qrels_file:
        return None
    if not (features and qrels_file):
        given, missing = ("--dev_features_file", "--dev_qrels_file")[::1 if features else -1]
        problems.add(f"{given} needs {missing}")
        return None
    count, summary = problems.count, summarise(features, problems)
    qrels = read_qrels(qrels_file, problems) if check_input_file(qrels_file, problems, "dev judgements") else {}
    if summary and summary.unpaired:
        problems.add(f"{summary.unpaired} of {summary.examples} ids in the dev features are not query_id#passage_id; "
                     f"tokenize the pairs with --set_name dev")
    if problems.count > count:
        return None
    queries = {pair_id.partition("#")[0] for path in features for chunk in read_chunks(path) for pair_id in chunk.ids}
    if not queries & qrels.keys():
        problems.add(f"{qrels_file}: judges none of the queries in the dev features; do the two belong together?")
    elif unjudged := queries - qrels.keys():
        warn(f"{len(unjudged)} of {len(queries)} dev queries are not judged in {qrels_file}; they are left out")
    check_relevant(qrels_file, qrels, queries, problems)
    return DevSet(summary, qrels)
