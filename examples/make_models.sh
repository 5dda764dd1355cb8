#!/usr/bin/env bash
# Make the two models of the embedded example again: bash examples/make_models.sh [FOLDER]
#
# Half an hour to an hour on two CPU cores. FOLDER (default: example_models) receives the intermediate files and, at
# the end, teacher/ and general_student/; compare them with the ones in this folder before replacing those. No query of
# the dev or test split is read on the way.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../python_env.sh"
use_python requirements.txt
FOLDER="${1:-example_models}"
ALL=1000000
mkdir -p "$FOLDER"

# build NAME NEGATIVES: a collection in FOLDER/NAME, with examples from all training and pseudo queries
build() {
    "$PYTHON" "$ROOT/examples/build_collection.py" --output_dir "$FOLDER/$1" --train_queries $ALL \
        --pseudo_queries $ALL --hard_negatives "$2"
}

# tokenize NAME: its training pairs, in FOLDER/NAME.pkl
tokenize() {
    "$PYTHON" "$ROOT/tokenize_to_features.py" --set_name train --raw_data_file "$FOLDER/$1/train.examples.tsv" \
        --output_features_file "$FOLDER/$1.pkl" --bert_model_dir "$FOLDER/teacher_start" --max_seq_length 128
}

# finetune START FEATURES OUTPUT [more arguments of distill.py]
finetune() {
    "$PYTHON" "$ROOT/distill.py" --distill_model finetune --general_student_model "$1" --features_file "$2" \
        --output_student_dir "$3" --cache_file_dir "$FOLDER/cache" --padding masked --train_batch_size 64 \
        --num_train_epochs 1 --train_loss_step 50 --save_model_step 300 --bf16 --resume "${@:4}"
}

build first 3
build second 5
TEXTS=("$FOLDER/first/corpus.txt" "$FOLDER/first/queries.train.tsv")
"$PYTHON" "$ROOT/examples/pretrain.py" --corpus "${TEXTS[@]}" --output_dir "$FOLDER/teacher_start" \
    --num_hidden_layers 4 --hidden_size 128 --num_train_epochs 3 --bf16
"$PYTHON" "$ROOT/examples/pretrain.py" --corpus "${TEXTS[@]}" --output_dir "$FOLDER/student_start" \
    --num_hidden_layers 2 --hidden_size 128 --layers_of "$FOLDER/teacher_start" --num_train_epochs 1 \
    --learning_rate 5e-4 --bf16

tokenize first
tokenize second
finetune "$FOLDER/teacher_start" "$FOLDER/first.pkl" "$FOLDER/teacher_first" --learning_rate 7e-4
finetune "$FOLDER/teacher_first" "$FOLDER/second.pkl" "$FOLDER/teacher_second" --learning_rate 5e-4 --seed 43

"$PYTHON" "$ROOT/examples/store_float16.py" --model_dir "$FOLDER/teacher_second" --output_dir "$FOLDER/teacher"
"$PYTHON" "$ROOT/examples/store_float16.py" --model_dir "$FOLDER/student_start" --output_dir "$FOLDER/general_student"
