"""Score query-passage pairs with a BERT cross-encoder.

    python reranker.py --model_dir student --features_file test.pkl --output_scores_file scores.tsv --device 0 --bf16

In: a fine-tuned or distilled model (directory or Hugging Face hub id; teachers can be scored too) and feature file(s) of
pairs (tokenize_to_features.py --set_name test).
Out: query_id <tab> passage_id <tab> score, a line for each pair in input order. The score is the probability of
relevance (softmax over the two classes, class 1; printed in full so that close scores stay apart), or with --score
log_odds the difference of the two logits, which does not crowd at 0 and 1. A model with a single logit z has the two
logits (0, z): its probability is z's sigmoid, its log-odds z.

Memory does not grow with the number of pairs: they are read, scored and written a chunk at a time. Within a chunk pairs
of similar length share a batch and only the [CLS] position of the last layer is computed, which changes no score.

Several GPUs of a machine, or processes on its CPU, compute batches in turn; the score file is the same to the byte:

    torchrun --standalone --nproc_per_node=4 reranker.py --model_dir student --features_file test.pkl ...
"""
import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig

from simplified_tinybert.common.checks import check_length, check_model_fits, find_models
from simplified_tinybert.common.device import keep_freed_memory, select_device
from simplified_tinybert.common.files import (
    Problems,
    UserError,
    check_output_file,
    locked,
    name_in_errors,
    process_number,
    run_main,
    say,
    sync_directory,
)
from simplified_tinybert.common.processes import Processes, process_group
from simplified_tinybert.common.records import read_record, record, record_file, record_path
from simplified_tinybert.data.features import Examples, FeatureSummary, summarise
from simplified_tinybert.model.bert import CrossEncoder, count_parameters, describe
from simplified_tinybert.model.precision import select_precision, warn_if_emulated
from simplified_tinybert.model.pretrained import load_ranker
from simplified_tinybert.model.weights import weights_checksum
from simplified_tinybert.ranking.scoring import BATCH_TOKENS, BatchLimits, prepare, relevance, scored_chunks


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_dir", required=True, help="directory or hub id of the model")
    add("--features_file", type=Path, nargs="+", required=True, help="feature file(s) of pairs")
    add("--output_scores_file", type=Path, required=True, help="score file to write")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, or a CUDA index such as 0 (default: auto)")
    add("--no_cuda", action="store_true", help="compute on the CPU whatever --device says")
    add("--cache_file_dir", type=Path, help="accepted for the original's command lines; nothing is cached here")
    add("--eval_batch_size", type=int, help="most pairs of a batch (default: as many as --batch_tokens admits)")
    add("--batch_tokens", type=int, help="positions of a batch with padding (default: 2048 on a CPU, 65536 on CUDA)")
    add("--max_seq_length", type=int, help="checked against the features (default: as they were made)")
    add("--score", choices=("probability", "log_odds"), default="probability", help="see above (default: probability)")
    add("--pooled_relu", action="store_true",
        help="relu before the classifier, for checkpoints trained with it whose configuration does not say so")
    add("--fp16", action="store_true", help="compute in float16 (CUDA); pooler and classifier in float32")
    add("--bf16", action="store_true", help="compute in bfloat16; pooler and classifier in float32")
    add("--int8", action="store_true", help="8-bit matrix products (CPU): faster, scores change a little; see README")
    add("--resume", action="store_true", help="go on after the last chunk of an interrupted run")
    return parser.parse_args()


def score_lines(ids: list[str], scores: np.ndarray) -> str:
    """Score file lines; an id is split at its first '#', for passage ids may hold more of them."""
    return "".join(f"{example_id.replace('#', chr(9), 1)}\t{score!r}\n"
                   for example_id, score in zip(ids, scores.tolist()))


def check_settings(args: argparse.Namespace, problems: Problems) -> dict:
    """Role → directory and configuration of the model; what is wrong before features are there is added to problems."""
    for name in ("eval_batch_size", "batch_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            problems.add(f"--{name} {getattr(args, name)}: expected 1 or more")
    if args.int8 and (args.fp16 or args.bf16 or select_device(args.device, args.no_cuda).type != "cpu"):
        problems.add("--int8: runs on a CPU alone and not with --fp16 or --bf16; add --device cpu, or leave it out")
    return find_models({"model": args.model_dir}, problems)


def check_all(args: argparse.Namespace, problems: Problems) -> tuple[Path, BertConfig, FeatureSummary]:
    """Model directory, its configuration, and the features, once all is known to fit. Raises UserError otherwise."""
    if process_number("RANK") == 0:                     # which alone writes
        check_output_file(args.output_scores_file, problems, inputs=args.features_file)
    models, summary = check_settings(args, problems), summarise(args.features_file, problems)
    if summary:
        width = check_length(args.max_seq_length, summary, problems)
        for role, (directory, config) in models.items():
            check_model_fits(role, directory, config, summary, width, problems)
        if summary.unpaired:
            problems.add(f"{summary.unpaired} of {summary.examples} ids in the features are not query_id#passage_id; "
                         f"tokenize the pairs with --set_name test")
    problems.raise_if_any()
    return *models["model"], summary


def settings(args: argparse.Namespace, directory: Path, summary: FeatureSummary, batch_tokens: int) -> dict:
    """What must be the same for --resume to end in the same bytes."""
    return {"weights": weights_checksum(directory), "features": summary.checksum, "batch_tokens": batch_tokens,
            **{name: getattr(args, name)
               for name in ("eval_batch_size", "score", "pooled_relu", "fp16", "bf16", "int8")}}


def written_pairs(partial: Path, about: Path, wanted: dict, chunks: list[int]) -> int:
    """Pairs of the whole chunks (sizes: `chunks`) that an interrupted run has written; what follows is cut off."""
    if not (partial.stat().st_size and about.is_file()):
        return 0
    if read_record(about)["settings"] != wanted:
        raise UserError(f"{partial}: was written with another model, features, settings or version; repeat those, or "
                        f"remove the file to start again")
    boundaries, lines, position, done, keep = set(np.cumsum(chunks).tolist()), 0, 0, 0, 0
    with open(partial, "rb+") as handle:
        for line in handle:
            lines, position = lines + line.endswith(b"\n"), position + len(line)
            if lines in boundaries and line.endswith(b"\n"):
                done, keep = lines, position
        handle.truncate(keep)
    return done


def load_model(args: argparse.Namespace, directory: Path, config: BertConfig, device: torch.device,
               dtype: torch.dtype | None) -> tuple[CrossEncoder, int]:
    """The model on the device, in the precision that is asked for, and its parameters. Raises UserError."""
    model, notes = load_ranker(directory, config)
    for note in notes:
        say(f"note         {note}")
    model.config.pooled_relu = args.pooled_relu or getattr(config, "pooled_relu", False)
    say(f"model        {describe(model)}")
    parameters = count_parameters(model)
    prepare(model.to(device), dtype, args.int8)
    return model, parameters


def write_scores(scored: Iterator[tuple[Examples, np.ndarray]], score: str, path: Path) -> None:
    """Append the scores of all chunks to `path`, a chunk at a time."""
    with name_in_errors(path), open(path, "a", encoding="utf-8", newline="\n") as handle:
        for chunk, logits in scored:
            handle.write(score_lines(chunk.ids, relevance(logits, score)))
            handle.flush()
        os.fsync(handle.fileno())


def rerank(args: argparse.Namespace, device: torch.device, processes: Processes) -> None:
    problems = Problems()
    dtype = select_precision(args.fp16, args.bf16, device, problems)
    directory, config, summary = check_all(args, problems)
    warn_if_emulated(dtype, device, "leave the flag out, or use --int8")
    model, parameters = load_model(args, directory, config, device, dtype)

    output = Path(os.path.realpath(args.output_scores_file))
    partial = output.with_name(output.name + ".partial")
    about = record_path(partial)                        # the one beside the output is of what stands there until then
    batch_tokens = args.batch_tokens or BATCH_TOKENS[device.type]
    facts = {"settings": settings(args, directory, summary, batch_tokens), "device": str(device)}
    processes.check_agreement(facts["settings"])

    def scored(done: int) -> Iterator[tuple[Examples, np.ndarray]]:
        done = processes.gather(done)[0]                # the first process knows
        return scored_chunks(model, summary, BatchLimits(batch_tokens, args.eval_batch_size), processes, done)

    if not processes.first:
        for _ in scored(0):
            pass
        return
    partial.touch()
    with locked(partial):
        done = written_pairs(partial, about, facts["settings"], summary.chunks) if args.resume else 0
        os.truncate(partial, partial.stat().st_size if done else 0)
        record(about, args, **facts)
        start = time.perf_counter()
        write_scores(scored(done), args.score, partial)
        os.replace(partial, output)
        about.unlink(missing_ok=True)
    sync_directory(output.parent)
    speed = (summary.examples - done) / (time.perf_counter() - start)
    record_file(output, args, args.features_file, **facts, processes=processes.count, parameters=parameters,
                pairs_per_second=speed)
    say(f"scores       {output}: {summary.examples:,} pairs, {speed:,.1f} pairs/s")


def main() -> None:
    args = parse_args()
    device = select_device(args.device, args.no_cuda)
    keep_freed_memory(device)
    with process_group(device) as processes:
        rerank(args, device, processes)


if __name__ == "__main__":
    run_main(main, several=True)
