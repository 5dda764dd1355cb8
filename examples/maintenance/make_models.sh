#!/usr/bin/env bash
# Make the two models of the built-in example again: bash examples/maintenance/make_models.sh [DIRECTORY]
#
# Takes half an hour to an hour on two CPU cores. Intermediate files, teacher/ and general_student/ are written to
# DIRECTORY (default: example_models). Compare these models with the ones in examples/ before replacing those. Queries of
# the dev and test splits are never read.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../python_env.sh"
use_python requirements.txt
export PYTHONPATH="$ROOT"
DIRECTORY="${1:-example_models}"
ALL=1000000
mkdir -p "$DIRECTORY"

# build NAME NEGATIVES: make a collection in DIRECTORY/NAME, with examples from all training and pseudo queries
build() {
    "$PYTHON" -m examples.build_collection --output_dir "$DIRECTORY/$1" --train_queries $ALL \
        --pseudo_queries $ALL --hard_negatives "$2"
}

# tokenize NAME: tokenize the training pairs of that collection to DIRECTORY/NAME.pkl
tokenize() {
    "$PYTHON" "$ROOT/tokenize_to_features.py" --set_name train --raw_data_file "$DIRECTORY/$1/train.examples.tsv" \
        --output_features_file "$DIRECTORY/$1.pkl" --bert_model_dir "$DIRECTORY/teacher_start" --max_seq_length 128
}

# finetune START FEATURES OUTPUT [more arguments for distill.py]
finetune() {
    "$PYTHON" "$ROOT/distill.py" --distill_model finetune --general_student_model "$1" --features_file "$2" \
        --output_student_dir "$3" --cache_file_dir "$DIRECTORY/cache" --padding masked --train_batch_size 64 \
        --num_train_epochs 1 --train_loss_step 50 --save_model_step 300 --bf16 --resume "${@:4}"
}

build first 3
build second 5
TEXTS=("$DIRECTORY/first/corpus.txt" "$DIRECTORY/first/queries.train.tsv")
"$PYTHON" -m examples.maintenance.pretrain --corpus "${TEXTS[@]}" --output_dir "$DIRECTORY/teacher_start" \
    --num_hidden_layers 4 --hidden_size 128 --num_train_epochs 3 --bf16
"$PYTHON" -m examples.maintenance.pretrain --corpus "${TEXTS[@]}" --output_dir "$DIRECTORY/student_start" \
    --num_hidden_layers 2 --hidden_size 128 --layers_of "$DIRECTORY/teacher_start" --num_train_epochs 1 \
    --learning_rate 5e-4 --bf16

tokenize first
tokenize second
finetune "$DIRECTORY/teacher_start" "$DIRECTORY/first.pkl" "$DIRECTORY/teacher_first" --learning_rate 7e-4
finetune "$DIRECTORY/teacher_first" "$DIRECTORY/second.pkl" "$DIRECTORY/teacher_second" --learning_rate 5e-4 --seed 43

"$PYTHON" -m examples.maintenance.store_float16 --model_dir "$DIRECTORY/teacher_second" --output_dir "$DIRECTORY/teacher"
"$PYTHON" -m examples.maintenance.store_float16 --model_dir "$DIRECTORY/student_start" --output_dir "$DIRECTORY/general_student"
