"""How good a student is while it is trained: dev pairs re-ranked, documents by their best passage, two measures."""
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from simplified_tinybert.common.files import Problems, check_input_file, warn
from simplified_tinybert.common.processes import Processes
from simplified_tinybert.data.features import Examples, FeatureSummary, read_chunks, summarise
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.model.precision import autocast
from simplified_tinybert.ranking.measures import Qrels, other_measures, parse_measures, reciprocal_ranks
from simplified_tinybert.ranking.scoring import BatchLimits, relevance, score_chunk, scored_chunks, token_batches
from simplified_tinybert.ranking.trec import rank, read_qrels, split_passage_id

PROBED = 256                # training pairs on which a teacher is tried out


@dataclass
class DevSet:
    """Pairs of judged queries, in feature files."""
    paths: list[Path]
    summary: FeatureSummary
    qrels: Qrels

    def checksums(self) -> list[str]:
        return [self.summary.checksum, hashlib.sha256(repr(self.qrels).encode()).hexdigest()]

    def measures(self, student: CrossEncoder, device: torch.device, dtype: torch.dtype | None,
                 processes: Processes) -> dict[str, float]:
        """nDCG@10 and MRR@10 over the judged queries among the pairs; every process gets them."""
        training, best = student.training, {}                      # query id → document id → its best passage's score
        student.eval()
        with autocast(device, dtype):
            for chunk, logits in scored_chunks(student, self.summary, BatchLimits.of(device), processes,
                                               passing=True):
                for example_id, score in zip(chunk.ids, relevance(logits, "log_odds").tolist()):
                    query_id, _, passage_id = example_id.partition("#")
                    documents = best.setdefault(query_id, {})
                    document_id, _ = split_passage_id(passage_id)
                    documents[document_id] = max(score, documents.get(document_id, score))
        student.train(training)
        rankings = {query_id: rank(documents) for query_id, documents in best.items() if query_id in self.qrels}
        means = {name: mean for name, _, mean in [*reciprocal_ranks(self.qrels, rankings, level=1),
                                                  *other_measures(parse_measures(["nDCG@10"], 1, Problems()),
                                                                  self.qrels, rankings)]}
        return {name: means[name] for name in ("nDCG@10", "MRR@10")}


def warn_of_chance(teacher: CrossEncoder, examples: Examples, device: torch.device, dtype: torch.dtype | None) -> None:
    """Warn of a teacher that does not score the relevant ones of some hundred training pairs above the others.

    Before hours are spent on it: it was not fine-tuned, or its classes or the labels are swapped.
    """
    some = np.unique(np.linspace(0, len(examples) - 1, PROBED, dtype=np.int64))
    batches = (some[indices] for indices in token_batches(examples.lengths[some], BatchLimits.of(device)))
    with autocast(device, dtype):
        logits = score_chunk(teacher, examples, batches, device, tqdm(disable=True))
    area, error = area_under_curve(relevance(logits[some], "log_odds"), examples.labels[some] == 1)
    if area < 0.5 + 1.645 * error:                      # 0.5 is chance; one-sided, 5 %
        worse = "worse than chance: are its classes or the labels swapped?" if area < 0.5 - 1.645 * error else \
            "no better than chance: was it fine-tuned for ranking, on texts like these?"
        warn(f"the teacher scores a relevant pair above another one in {100 * area:.0f} % of the cases (of {len(some)} "
             f"training pairs), {worse}")


def area_under_curve(scores: np.ndarray, relevant: np.ndarray) -> tuple[float, float]:
    """How often a relevant pair is scored above another one, ties half, and the standard error if scores were chance.

    (1, 0) if all pairs are of one kind, of which nothing can be said.
    """
    above, below = scores[relevant][:, None], scores[~relevant]
    if not above.size or not below.size:
        return 1.0, 0.0
    area = float((above > below).mean() + 0.5 * (above == below).mean())
    return area, math.sqrt((len(scores) + 1) / (12 * above.size * below.size))


def find_dev_set(features: list[Path] | None, qrels_file: Path | None, problems: Problems) -> DevSet | None:
    """The dev set of --dev_features_file and --dev_qrels_file, if any; what is wrong with it is added to `problems`."""
    if not features and not qrels_file:
        return None
    if not (features and qrels_file):
        given, wanted = ("--dev_features_file", "--dev_qrels_file")[::1 if features else -1]
        problems.add(f"{given} needs {wanted} beside it")
        return None
    before, summary = problems.count, summarise(features, problems)
    qrels = read_qrels(qrels_file, problems) if check_input_file(qrels_file, problems, "dev judgements") else {}
    if problems.count > before:
        return None
    if summary.unpaired:
        problems.add(f"{summary.unpaired} of {summary.examples} ids in the dev features are not query_id#passage_id; "
                     f"tokenize the pairs with --set_name dev")
        return None
    queries = {example_id.partition("#")[0] for path in features for chunk in read_chunks(path)
               for example_id in chunk.ids}
    if not queries & qrels.keys():
        problems.add(f"{qrels_file}: judges none of the queries in the dev features; do the two belong together?")
    elif others := queries - qrels.keys():
        warn(f"{len(others)} of {len(queries)} dev queries are not judged in {qrels_file}, and left out")
    return DevSet(features, summary, qrels)
