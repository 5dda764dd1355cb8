#!/usr/bin/env bash
# Distill a student: bash distill.sh [more arguments of distill.py, such as --bf16]
#
# With nothing set this runs the embedded example: a collection made of Python's own documentation, a small teacher and
# a general student from examples/. For models and data of your own set what differs in the environment:
#   TEACHER_MODEL=nboost/pt-bert-base-uncased-msmarco STUDENT_MODEL=huawei-noah/TinyBERT_General_6L_768D \
#   FEATURES_FILE=train.pkl OUTPUT_STUDENT_DIR=student bash distill.sh --bf16
# FEATURES_FILE is a feature file, or TRAIN_EXAMPLES a file of `index <tab> query <tab> passage <tab> label` to make one.
# A run that was interrupted goes on where it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python_env.sh"

# The paper's settings, for data and models of your own
EXAMPLE_DIR="${EXAMPLE_DIR:-$ROOT/example_run}"
OUTPUT_STUDENT_DIR="${OUTPUT_STUDENT_DIR:-}"
CACHE_FILE_DIR="${CACHE_FILE_DIR:-}"
DISTILL_MODEL="${DISTILL_MODEL:-simplified}"       # finetune, standard, simplified
DEVICE="${DEVICE:-auto}"                           # auto, cpu, or a CUDA index
TEACHER_MODEL="${TEACHER_MODEL:-$ROOT/examples/teacher}"
STUDENT_MODEL="${STUDENT_MODEL:-$ROOT/examples/general_student}"
if [ -n "${FEATURES_FILE:-}${TRAIN_EXAMPLES:-}" ]; then
    MAX_SEQ_LENGTH="${MAX_SEQ_LENGTH:-256}"
    TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-64}"
    LEARNING_RATE="${LEARNING_RATE:-5e-5}"
    NUM_TRAIN_EPOCHS="${NUM_TRAIN_EPOCHS:-2}"
    TRAIN_LOSS_STEP="${TRAIN_LOSS_STEP:-1000}"
    SAVE_MODEL_STEP="${SAVE_MODEL_STEP:-3000}"
    OUTPUT_STUDENT_DIR="${OUTPUT_STUDENT_DIR:-student}"
    CACHE_FILE_DIR="${CACHE_FILE_DIR:-cache}"
else                                               # the embedded example: minutes on two CPU cores
    MAX_SEQ_LENGTH="${MAX_SEQ_LENGTH:-128}"
    TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-32}"
    LEARNING_RATE="${LEARNING_RATE:-1e-3}"
    NUM_TRAIN_EPOCHS="${NUM_TRAIN_EPOCHS:-1}"
    TRAIN_LOSS_STEP="${TRAIN_LOSS_STEP:-25}"
    SAVE_MODEL_STEP="${SAVE_MODEL_STEP:-200}"
    OUTPUT_STUDENT_DIR="${OUTPUT_STUDENT_DIR:-$EXAMPLE_DIR/student-$DISTILL_MODEL}"
    CACHE_FILE_DIR="${CACHE_FILE_DIR:-$EXAMPLE_DIR/cache}"
fi

use_python requirements.txt
if [ -z "${FEATURES_FILE:-}${TRAIN_EXAMPLES:-}" ]; then
    mkdir -p "$EXAMPLE_DIR"
    "$PYTHON" "$ROOT/examples/build_collection.py" --output_dir "$EXAMPLE_DIR/collection"
    TRAIN_EXAMPLES="$EXAMPLE_DIR/collection/train.examples.tsv"
    FEATURES_FILE="$EXAMPLE_DIR/train.pkl"
fi
if [ -n "${TRAIN_EXAMPLES:-}" ]; then
    FEATURES_FILE="${FEATURES_FILE:-$TRAIN_EXAMPLES.pkl}"
    "$PYTHON" "$ROOT/tokenize_to_features.py" --set_name train --raw_data_file "$TRAIN_EXAMPLES" \
        --output_features_file "$FEATURES_FILE" --bert_model_dir "$STUDENT_MODEL" --max_seq_length "$MAX_SEQ_LENGTH"
fi
"$PYTHON" "$ROOT/distill.py" \
    --device "$DEVICE" \
    --features_file "$FEATURES_FILE" \
    --teacher_model "$TEACHER_MODEL" \
    --general_student_model "$STUDENT_MODEL" \
    --output_student_dir "$OUTPUT_STUDENT_DIR" \
    --cache_file_dir "$CACHE_FILE_DIR" \
    --distill_model "$DISTILL_MODEL" \
    --max_seq_length "$MAX_SEQ_LENGTH" \
    --train_batch_size "$TRAIN_BATCH_SIZE" \
    --learning_rate "$LEARNING_RATE" \
    --num_train_epochs "$NUM_TRAIN_EPOCHS" \
    --train_loss_step "$TRAIN_LOSS_STEP" \
    --save_model_step "$SAVE_MODEL_STEP" \
    --resume "$@"
