#!/usr/bin/env bash
# Distill a student: bash distill.sh [more arguments of distill.py, such as --bf16]
#
# Without variables, this runs the built-in example: a collection made from the documentation of Python packages,
# and the small teacher and general student of examples/. Results are in example_run/. With your own models and data:
#   TEACHER_MODEL=nboost/pt-bert-base-uncased-msmarco STUDENT_MODEL=huawei-noah/TinyBERT_General_6L_768D \
#   FEATURES_FILE=train.pkl OUTPUT_STUDENT_DIR=student bash distill.sh --bf16
# An interrupted run resumes.
#
# Variables, with their values or defaults for your own data | for the example:
#   TEACHER_MODEL, STUDENT_MODEL   directories or hub ids | examples/teacher, examples/general_student
#   FEATURES_FILE                  feature file | created
#   TRAIN_EXAMPLES                 examples to tokenize instead: index <tab> query <tab> passage <tab> label | created
#   MAX_SEQ_LENGTH                 tokens of a pair: 256 with TRAIN_EXAMPLES, else as in FEATURES_FILE | 96
#   OUTPUT_STUDENT_DIR             student | example_run/student-$DISTILL_MODEL
#   CACHE_FILE_DIR                 cache | example_run/cache
#   DISTILL_MODEL                  finetune, standard, tinybert, simplified (default)
#   DEVICE                         auto (default), cpu, or a CUDA index
#   PROCESSES                      number of processes that share each batch, such as the number of GPUs (default 1)
#   TRAIN_BATCH_SIZE 64 | 16   LEARNING_RATE 5e-5 | 1e-3   NUM_TRAIN_EPOCHS 2 | 0.5   TRAIN_LOSS_STEP 1000 | 25
#   SAVE_MODEL_STEP 3000 | 200
#   EXAMPLE_DIR                    directory of the example (default example_run)
#   PYTHON                         Python interpreter; its packages are not checked
# The example also sets --padding masked, which is faster.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python_env.sh"
help_for "${BASH_SOURCE[0]}" "$@"

EXAMPLE_DIR="${EXAMPLE_DIR:-$ROOT/example_run}"
OUTPUT_STUDENT_DIR="${OUTPUT_STUDENT_DIR:-}"
CACHE_FILE_DIR="${CACHE_FILE_DIR:-}"
DISTILL_MODEL="${DISTILL_MODEL:-simplified}"
DEVICE="${DEVICE:-auto}"
PROCESSES="${PROCESSES:-1}"
MAX_SEQ_LENGTH="${MAX_SEQ_LENGTH:-}"
padding=()          # masked padding is faster; your own data keep the original's
if [ -n "${FEATURES_FILE:-}${TRAIN_EXAMPLES:-}" ]; then     # your own data: the paper's settings
    [ -n "${STUDENT_MODEL:-}" ] || fail "set STUDENT_MODEL to the general student for your data (directory or hub id)"
    [ -n "${TEACHER_MODEL:-}" ] || [ "$DISTILL_MODEL" = finetune ] ||
        fail "set TEACHER_MODEL to the teacher for your data (directory or hub id), or DISTILL_MODEL=finetune"
    TEACHER_MODEL="${TEACHER_MODEL:-}"
    TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-64}"
    LEARNING_RATE="${LEARNING_RATE:-5e-5}"
    NUM_TRAIN_EPOCHS="${NUM_TRAIN_EPOCHS:-2}"
    TRAIN_LOSS_STEP="${TRAIN_LOSS_STEP:-1000}"
    SAVE_MODEL_STEP="${SAVE_MODEL_STEP:-3000}"
    OUTPUT_STUDENT_DIR="${OUTPUT_STUDENT_DIR:-student}"
    CACHE_FILE_DIR="${CACHE_FILE_DIR:-cache}"
else                                                       # the example: takes minutes on two CPU cores
    TEACHER_MODEL="${TEACHER_MODEL:-$ROOT/examples/teacher}"
    STUDENT_MODEL="${STUDENT_MODEL:-$ROOT/examples/general_student}"
    MAX_SEQ_LENGTH="${MAX_SEQ_LENGTH:-96}"
    padding=(--padding masked)
    TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-16}"
    LEARNING_RATE="${LEARNING_RATE:-1e-3}"
    NUM_TRAIN_EPOCHS="${NUM_TRAIN_EPOCHS:-0.5}"
    TRAIN_LOSS_STEP="${TRAIN_LOSS_STEP:-25}"
    SAVE_MODEL_STEP="${SAVE_MODEL_STEP:-200}"
    OUTPUT_STUDENT_DIR="${OUTPUT_STUDENT_DIR:-$EXAMPLE_DIR/student-$DISTILL_MODEL}"
    CACHE_FILE_DIR="${CACHE_FILE_DIR:-$EXAMPLE_DIR/cache}"
fi

settings=(--device="$DEVICE" ${TEACHER_MODEL:+--teacher_model="$TEACHER_MODEL"} --general_student_model="$STUDENT_MODEL"
    --output_student_dir="$OUTPUT_STUDENT_DIR" --cache_file_dir="$CACHE_FILE_DIR" --distill_model="$DISTILL_MODEL" --resume)
given=()
if [ -n "${TRAIN_EXAMPLES:-}" ]; then
    given=(TRAIN_EXAMPLES)
    MAX_SEQ_LENGTH="${MAX_SEQ_LENGTH:-256}"
elif [ -n "${FEATURES_FILE:-}" ]; then
    given=(FEATURES_FILE)
fi

batch_size=()       # --group_by_query is checked with it
[[ ! "$TRAIN_BATCH_SIZE" =~ ^[1-9][0-9]{0,17}$ ]] || batch_size=(--train_batch_size="$TRAIN_BATCH_SIZE")
use_python requirements.txt
check_settings PROCESSES DEVICE TRAIN_BATCH_SIZE LEARNING_RATE NUM_TRAIN_EPOCHS TRAIN_LOSS_STEP SAVE_MODEL_STEP \
    ${MAX_SEQ_LENGTH:+MAX_SEQ_LENGTH} OUTPUT_STUDENT_DIR CACHE_FILE_DIR ${given[@]+"${given[@]}"} \
    -- check_settings distill.py --features_file=- ${batch_size[@]+"${batch_size[@]}"} "${settings[@]}" "$@"
if [ -z "${FEATURES_FILE:-}${TRAIN_EXAMPLES:-}" ]; then
    mkdir -p "$EXAMPLE_DIR"
    PYTHONPATH="$ROOT" "$PYTHON" -m examples.build_collection --output_dir "$EXAMPLE_DIR/collection"
    TRAIN_EXAMPLES="$EXAMPLE_DIR/collection/train.examples.tsv"
    FEATURES_FILE="$EXAMPLE_DIR/train.pkl"
fi
if [ -n "${TRAIN_EXAMPLES:-}" ]; then
    FEATURES_FILE="${FEATURES_FILE:-$TRAIN_EXAMPLES.pkl}"
    "$PYTHON" "$ROOT/tokenize_to_features.py" --set_name train --raw_data_file="$TRAIN_EXAMPLES" \
        --output_features_file="$FEATURES_FILE" --bert_model_dir="$STUDENT_MODEL" --max_seq_length "$MAX_SEQ_LENGTH"
fi
launch "$ROOT/distill.py" \
    --features_file="$FEATURES_FILE" \
    "${settings[@]}" \
    ${MAX_SEQ_LENGTH:+--max_seq_length "$MAX_SEQ_LENGTH"} \
    --train_batch_size "$TRAIN_BATCH_SIZE" \
    --learning_rate "$LEARNING_RATE" \
    --num_train_epochs "$NUM_TRAIN_EPOCHS" \
    --train_loss_step "$TRAIN_LOSS_STEP" \
    --save_model_step "$SAVE_MODEL_STEP" \
    ${padding[@]+"${padding[@]}"} \
    "$@"
