#!/usr/bin/env bash
# Re-rank and evaluate: bash reranker.sh [more arguments of reranker.py, such as --bf16]
#
# With nothing set this re-ranks the test queries of the embedded example with the student of `bash distill.sh`, with
# the same student before distillation and with the teacher, and prints a table. For a model and data of your own:
#   MODEL_DIR=student FEATURES_FILE=test.pkl OUTPUT_DIR=results QRELS_FILE=qrels.txt bash reranker.sh --bf16
# FEATURES_FILE is a feature file, or TEST_PAIRS a file of `query_id#passage_id <tab> query <tab> passage` to make one.
# OUTPUT_DIR receives scores.tsv and run.trec; with QRELS_FILE the run is evaluated as well.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python_env.sh"

EXAMPLE_DIR="${EXAMPLE_DIR:-$ROOT/example_run}"
DEVICE="${DEVICE:-auto}"                           # auto, cpu, or a CUDA index
AGGREGATION="${AGGREGATION:-MaxP}"                 # MaxP, FirstP, SumP, AvgP, 2-Max_and_AvgP, ...
MEASURES="${MEASURES:-nDCG@10 AP}"

# rerank MODEL FEATURES SCORES RUN [more arguments]: scores of passages, then the ranking of documents
rerank() {
    "$PYTHON" "$ROOT/reranker.py" --device "$DEVICE" --model_dir "$1" --features_file "$2" --output_scores_file "$3" \
        --resume "${@:5}"
    "$PYTHON" "$ROOT/convert_to_trec_results.py" --scores_file "$3" --output_results_file "$4" \
        --aggregation "$AGGREGATION"
}

# tokenize PAIRS FEATURES MODEL LENGTH
tokenize() {
    "$PYTHON" "$ROOT/tokenize_to_features.py" --set_name test --raw_data_file "$1" --output_features_file "$2" \
        --bert_model_dir "$3" --max_seq_length "$4"
}

use_python requirements.txt
if [ -n "${FEATURES_FILE:-}${TEST_PAIRS:-}" ]; then
    : "${MODEL_DIR:?set it to the folder or hub id of the model}"
    OUTPUT_DIR="${OUTPUT_DIR:-results}"
    mkdir -p "$OUTPUT_DIR"
    if [ -n "${TEST_PAIRS:-}" ]; then
        FEATURES_FILE="${FEATURES_FILE:-$OUTPUT_DIR/test.pkl}"
        tokenize "$TEST_PAIRS" "$FEATURES_FILE" "$MODEL_DIR" "${MAX_SEQ_LENGTH:-256}"
    fi
    rerank "$MODEL_DIR" "$FEATURES_FILE" "$OUTPUT_DIR/scores.tsv" "$OUTPUT_DIR/run.trec" "$@"
    if [ -n "${QRELS_FILE:-}" ]; then
        # shellcheck disable=SC2086                  # MEASURES is a list
        "$PYTHON" "$ROOT/msmarco_mrr_eval.py" "$QRELS_FILE" "$OUTPUT_DIR/run.trec" --measures $MEASURES
    fi
    exit
fi

TEACHER_MODEL="${TEACHER_MODEL:-$ROOT/examples/teacher}"
MODEL_DIR="${MODEL_DIR:-$EXAMPLE_DIR/student-simplified}"
if [ ! -f "$MODEL_DIR/model.safetensors" ]; then
    echo "error: $MODEL_DIR holds no student yet; make it first: bash distill.sh" >&2
    exit 2
fi
RESULTS="$EXAMPLE_DIR/results"
mkdir -p "$RESULTS"
tokenize "$EXAMPLE_DIR/collection/test.pairs.tsv" "$EXAMPLE_DIR/test.pkl" "$MODEL_DIR" "${MAX_SEQ_LENGTH:-128}"
rerank "$TEACHER_MODEL" "$EXAMPLE_DIR/test.pkl" "$RESULTS/teacher.tsv" "$RESULTS/teacher.trec" "$@"
rerank "$MODEL_DIR/checkpoint-0" "$EXAMPLE_DIR/test.pkl" "$RESULTS/student-before.tsv" "$RESULTS/student-before.trec" "$@"
rerank "$MODEL_DIR" "$EXAMPLE_DIR/test.pkl" "$RESULTS/student.tsv" "$RESULTS/student.trec" "$@"
"$PYTHON" "$ROOT/examples/compare.py" --qrels "$EXAMPLE_DIR/collection/qrels.test.txt" --output_table "$RESULTS/table.md" \
    --runs "BM25=$EXAMPLE_DIR/collection/bm25.test.txt" "teacher=$RESULTS/teacher.trec" \
    "student before distillation=$RESULTS/student-before.trec" "student after distillation=$RESULTS/student.trec"
