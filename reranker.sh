#!/usr/bin/env bash
# Re-rank and evaluate: bash reranker.sh [more arguments of reranker.py, such as --bf16]
#
# Without variables, this re-ranks the test queries of the built-in example with the student of `bash distill.sh` and
# with its teacher, and prints a table. Files are in example_run/results, table and figure in example_run/results/report.
# With your own model and data:
#   MODEL_DIR=student FEATURES_FILE=test.pkl OUTPUT_DIR=results QRELS_FILE=qrels.txt bash reranker.sh --bf16
#
# Variables (OUTPUT_DIR, QRELS_FILE, MEASURES and COMPLETE only with your own data):
#   MODEL_DIR         directory or hub id of the model (example: example_run/student-$DISTILL_MODEL)
#   FEATURES_FILE     feature file of the pairs
#   TEST_PAIRS        pairs to tokenize instead: query_id#passage_id <tab> query <tab> passage
#   MAX_SEQ_LENGTH    tokens, for tokenizing (default 256; example: 96)
#   OUTPUT_DIR        directory for scores.tsv and run.trec (default results)
#   QRELS_FILE        judgements, to evaluate the run
#   MEASURES          measures of ir_measures (default "nDCG@10 AP")
#   COMPLETE          1, yes or true: average over all judged queries, missing ones count as 0 (official for MS MARCO);
#                     0, no, false or nothing: average over the judged queries in the run
#   AGGREGATION       MaxP (default), FirstP, SumP, AvgP, 2-Max_and_AvgP, ...
#   DEVICE            auto (default), cpu, or a CUDA index
#   PROCESSES         number of processes that share the pairs, such as the number of GPUs (default 1)
#   DISTILL_MODEL, TEACHER_MODEL, EXAMPLE_DIR, PYTHON   as in distill.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python_env.sh"
help_for "${BASH_SOURCE[0]}" "$@"

EXAMPLE_DIR="${EXAMPLE_DIR:-$ROOT/example_run}"
DEVICE="${DEVICE:-auto}"
PROCESSES="${PROCESSES:-1}"
AGGREGATION="${AGGREGATION:-MaxP}"
MEASURES="${MEASURES:-nDCG@10 AP}"
COMPLETE="${COMPLETE:-}"

[ -n "${MODEL_DIR:-}" ] || [ -z "${FEATURES_FILE:-}${TEST_PAIRS:-}" ] ||
    fail "set MODEL_DIR to the directory or hub id of the model"

# rerank MODEL FEATURES SCORES RUN [more arguments]: score passages, then rank documents
rerank() {
    launch "$ROOT/reranker.py" --device "$DEVICE" --model_dir="$1" --features_file="$2" --output_scores_file "$3" \
        --resume "${@:5}"
    "$PYTHON" "$ROOT/convert_to_trec_results.py" --scores_file "$3" --output_results_file "$4" \
        --aggregation "$AGGREGATION"
}

# tokenize PAIRS FEATURES MODEL LENGTH
tokenize() {
    "$PYTHON" "$ROOT/tokenize_to_features.py" --set_name test --raw_data_file "$1" --output_features_file "$2" \
        --bert_model_dir "$3" --max_seq_length "$4"
}

# check [NAME ...] -- [HOW SCRIPT arguments]: check these and the common settings
check() {
    # shellcheck disable=SC2046                    # the substitution yields two words or none
    check_settings PROCESSES DEVICE AGGREGATION COMPLETE ${MAX_SEQ_LENGTH:+MAX_SEQ_LENGTH} \
        $([ -z "${QRELS_FILE:-}" ] || echo QRELS_FILE MEASURES) "$@"
}

use_python requirements.txt
command=(-- check_settings reranker.py --features_file=- --output_scores_file=- --device="$DEVICE" --resume)
if [ -n "${FEATURES_FILE:-}${TEST_PAIRS:-}" ]; then
    OUTPUT_DIR="${OUTPUT_DIR:-results}"
    given=(FEATURES_FILE)
    if [ -n "${TEST_PAIRS:-}" ]; then
        given=(TEST_PAIRS)
        MAX_SEQ_LENGTH="${MAX_SEQ_LENGTH:-256}"
    fi
    check OUTPUT_DIR "${given[@]}" "${command[@]}" --model_dir="$MODEL_DIR" "$@"
    mkdir -p "$OUTPUT_DIR"
    if [ -n "${TEST_PAIRS:-}" ]; then
        FEATURES_FILE="${FEATURES_FILE:-$OUTPUT_DIR/test.pkl}"
        tokenize "$TEST_PAIRS" "$FEATURES_FILE" "$MODEL_DIR" "$MAX_SEQ_LENGTH"
    fi
    rerank "$MODEL_DIR" "$FEATURES_FILE" "$OUTPUT_DIR/scores.tsv" "$OUTPUT_DIR/run.trec" "$@"
    if [ -n "${QRELS_FILE:-}" ]; then
        read -r -d "" -a measures <<< "$MEASURES" || true      # read reports failure at the end of input
        complete=()
        if is_yes "$COMPLETE"; then complete=(--complete); fi
        "$PYTHON" "$ROOT/msmarco_mrr_eval.py" ${complete[@]+"${complete[@]}"} "$QRELS_FILE" "$OUTPUT_DIR/run.trec" \
            --measures "${measures[@]}"
    fi
    exit
fi

TEACHER_MODEL="${TEACHER_MODEL:-$ROOT/examples/teacher}"
MODEL_DIR="${MODEL_DIR:-$EXAMPLE_DIR/student-${DISTILL_MODEL:-simplified}}"
MAX_SEQ_LENGTH="${MAX_SEQ_LENGTH:-96}"
if [ ! -f "$MODEL_DIR/model.safetensors" ]; then
    check
    fail "$MODEL_DIR contains no student; create it first: bash distill.sh"
fi
check "${command[@]}" --model_dir="$MODEL_DIR" "$@"
RESULTS="$EXAMPLE_DIR/results"
mkdir -p "$RESULTS"
tokenize "$EXAMPLE_DIR/collection/test.pairs.tsv" "$EXAMPLE_DIR/test.pkl" "$MODEL_DIR" "$MAX_SEQ_LENGTH"
rerank "$TEACHER_MODEL" "$EXAMPLE_DIR/test.pkl" "$RESULTS/teacher.tsv" "$RESULTS/teacher.trec" "$@"
rerank "$MODEL_DIR" "$EXAMPLE_DIR/test.pkl" "$RESULTS/student.tsv" "$RESULTS/student.trec" "$@"
"$PYTHON" "$ROOT/report.py" --qrels "$EXAMPLE_DIR/collection/qrels.test.txt" --complete --measures MRR@10 nDCG@10 \
    --device "$DEVICE" --teacher teacher --baseline BM25 --output_dir "$RESULTS/report" \
    --system BM25 "$EXAMPLE_DIR/collection/bm25.test.txt" \
    --system teacher "$RESULTS/teacher.trec" "$TEACHER_MODEL" \
    --system student "$RESULTS/student.trec" "$MODEL_DIR"
