"""Score query-passage pairs with a BERT cross-encoder.

    python reranker.py --model_dir student --features_file test.pkl --output_scores_file scores.tsv --device 0 --bf16

In: a fine-tuned or distilled model, student or teacher (directory or Hugging Face hub id), and feature files of pairs
(tokenize_to_features.py --set_name test). For examples (--set_name train), the lines are example_id <tab> score, which
distill.py --teacher_scores_file reads; use --score log_odds for them.
Out: query_id <tab> passage_id <tab> score, one line per pair in input order. The score is the probability of relevance
(softmax over the two classes, class 1), printed in full precision so that close scores stay distinct. With --score
log_odds, it is the difference of the two logits, which does not saturate at 0 and 1. A model with a single logit z is
treated as having the two logits (0, z): its probability is the sigmoid of z, its log-odds are z.

Pairs are read, scored and written in chunks, so memory does not grow with their number. Within a chunk, pairs of
similar length share a batch, and only the [CLS] position of the last layer is computed. Both change scores by rounding
only.

Several GPUs of a machine, or several CPU processes, share the batches and write the same score file, byte for byte:

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

from simplified_tinybert.checks.compatibility import check_length, check_model_fits
from simplified_tinybert.common.device import explain_full_memory, prepare_device, select_device
from simplified_tinybert.common.files import (
    Problems,
    UserError,
    check_output_file,
    check_ranges,
    name_in_errors,
    process_number,
    run_main,
    say,
    sync_directory,
)
from simplified_tinybert.common.processes import Processes, locked, process_group
from simplified_tinybert.common.records import read_record, record, record_file, record_path
from simplified_tinybert.data.features import Examples, FeatureSummary, summarise
from simplified_tinybert.model.configuration import Models, find_models
from simplified_tinybert.model.precision import select_precision, warn_if_slow
from simplified_tinybert.model.weights import settings_checksum, weights_checksum
from simplified_tinybert.ranking import scoring


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_dir", required=True, help="directory or hub id of the model")
    add("--features_file", type=Path, nargs="+", required=True, help="feature file(s) of pairs")
    add("--output_scores_file", type=Path, required=True, help="score file to write")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, or a CUDA index such as 0 (default: auto)")
    add("--no_cuda", action="store_true", help="use the CPU and ignore --device")
    add("--cache_file_dir", type=Path, help="ignored; accepted because the original has this flag")
    add("--eval_batch_size", type=int, help="largest number of pairs in a batch (default: limited by --batch_tokens)")
    add("--batch_tokens", type=int, help="tokens in a batch with padding (default: 2048 on a CPU, 65536 on CUDA)")
    add("--max_seq_length", type=int, help="checked against the features (default: the features' own)")
    add("--score", choices=("probability", "log_odds"), default="probability", help="see above (default: probability)")
    add("--pooled_relu", action="store_true",
        help="apply a ReLU before the classifier, for a model that was trained with it but does not record it")
    add("--fp16", action="store_true", help="compute in float16 (CUDA); pooler and classifier in float32")
    add("--bf16", action="store_true", help="compute in bfloat16; pooler and classifier in float32")
    add("--tf32", action="store_true", help="compute float32 products with 10-bit mantissas (CUDA)")
    add("--compile", action="store_true", help="compile the model with torch.compile (CUDA): for many pairs")
    add("--int8", action="store_true", help="8-bit matrix products (CPU): faster, less exact (benchmarks/README.md)")
    add("--resume", action="store_true", help="continue an interrupted run after its last complete chunk")
    return parser.parse_args()


def check_settings(args: argparse.Namespace, problems: Problems) -> Models:
    """Check everything but the features. Returns role → directory and configuration of the model."""
    check_ranges(args, problems, [(name, getattr(args, name) is None or getattr(args, name) >= 1, "1 or more")
                                  for name in ("eval_batch_size", "batch_tokens")])
    return find_models({"model": args.model_dir}, problems)


def check_inputs(args: argparse.Namespace, problems: Problems) -> tuple[Path, BertConfig, FeatureSummary]:
    """Return the model directory, its configuration and the features. Raises UserError with all problems."""
    if process_number("RANK") == 0:                     # the only process that writes
        check_output_file(args.output_scores_file, problems, inputs=args.features_file)
    models, summary = check_settings(args, problems), summarise(args.features_file, problems)
    if summary:
        max_seq_length = check_length(args.max_seq_length, summary, problems)
        for role, (directory, config) in models.items():
            check_model_fits(role, directory, config, summary, max_seq_length, problems)
        if summary.unpaired and summary.header["set_name"] != "train":
            problems.add(f"{summary.unpaired} of {summary.examples} ids in the features are not query_id#passage_id; "
                         f"tokenize the pairs with --set_name test")
    problems.raise_if_any()
    return *models["model"], summary


def resume_settings(args: argparse.Namespace, directory: Path, summary: FeatureSummary, batch_tokens: int) -> dict:
    """Return everything that must be equal for --resume to produce the same bytes."""
    flags = ["eval_batch_size", "score", "pooled_relu", "fp16", "bf16", "int8"]
    flags += [name for name in ("tf32", "compile") if getattr(args, name)]
    return {"weights": weights_checksum(directory), "model_settings": settings_checksum(directory),
            "features": summary.checksum, "batch_tokens": batch_tokens, **{name: getattr(args, name) for name in flags}}


def truncate_to_chunks(partial: Path, run_record: Path, settings: dict, chunk_sizes: list[int]) -> int:
    """Cut an interrupted run's scores after its last complete chunk. Returns the number of pairs that remain."""
    if not (partial.stat().st_size and run_record.is_file()):
        return 0
    if read_record(run_record)["settings"] != settings:
        raise UserError(f"{partial}: was written with another model, features, settings or version; use the same ones, "
                        f"or remove the file to start again")
    boundaries, done, size, position = set(np.cumsum(chunk_sizes).tolist()), 0, 0, 0
    with open(partial, "rb+") as handle:
        for number, line in enumerate(handle, start=1):
            position += len(line)
            if number in boundaries and line.endswith(b"\n"):
                done, size = number, position
        handle.truncate(size)
    return done


def write_scores(scored: Iterator[tuple[Examples, np.ndarray]], score: str, path: Path, paired: bool) -> None:
    """Append the scores to a file, chunk by chunk. paired: ids are query_id#passage_id, written as two columns."""
    with name_in_errors(path), open(path, "a", encoding="utf-8", newline="\n") as handle:
        for chunk, logits in scored:
            for example_id, value in zip(chunk.ids, scoring.relevance(logits, score).tolist()):
                columns = example_id.replace("#", "\t", 1) if paired else example_id
                handle.write(f"{columns}\t{value!r}\n")
            handle.flush()
        os.fsync(handle.fileno())


def rerank(args: argparse.Namespace, device: torch.device, processes: Processes) -> None:
    problems = Problems()
    dtype = select_precision(args, device, problems)
    directory, config, summary = check_inputs(args, problems)
    warn_if_slow(dtype, device, "leave the flag out, or use --int8")
    config.pooled_relu = args.pooled_relu or getattr(config, "pooled_relu", False)
    model, parameters = scoring.load_scorer(directory, config, device, dtype, args.int8)
    if args.compile:
        model.compile(dynamic=True, fullgraph=True)

    output = Path(os.path.realpath(args.output_scores_file))
    partial = output.with_name(output.name + ".partial")
    run_record = record_path(partial)                   # an older output keeps its own record until it is replaced
    batch_tokens = args.batch_tokens or scoring.BATCH_TOKENS[device.type]
    settings = resume_settings(args, directory, summary, batch_tokens)
    processes.check_agreement(settings)

    def scored(done: int) -> Iterator[tuple[Examples, np.ndarray]]:
        done = processes.gather(done)[0]                # only the first process knows the number
        limits = scoring.BatchLimits(batch_tokens, args.eval_batch_size)
        return scoring.scored_chunks(model, summary, limits, processes, done)

    if not processes.first:
        for _ in scored(0):
            pass
        return
    partial.touch()
    with locked(partial):
        done = truncate_to_chunks(partial, run_record, settings, summary.chunks) if args.resume else 0
        if not done:
            os.truncate(partial, 0)
        record(run_record, args, settings=settings, device=str(device))
        start = time.perf_counter()
        write_scores(scored(done), args.score, partial, paired=summary.header["set_name"] != "train")
        os.replace(partial, output)
        run_record.unlink(missing_ok=True)
    sync_directory(output.parent)
    speed = (summary.examples - done) / (time.perf_counter() - start)
    record_file(output, args, args.features_file, settings=settings, device=str(device), processes=processes.count,
                parameters=parameters, pairs_per_second=speed)
    say(f"scores       {output}: {summary.examples:,} pairs, {speed:,.1f} pairs/s")


def main() -> None:
    args = parse_args()
    device = select_device(args.device, args.no_cuda)
    with explain_full_memory("lower --batch_tokens"):
        prepare_device(device, args.tf32)
        with process_group(device) as processes:
            rerank(args, device, processes)


if __name__ == "__main__":
    run_main(main, distributed=True)
