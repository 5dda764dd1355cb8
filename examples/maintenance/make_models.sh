#!/usr/bin/env bash
# Make the two models of the built-in example again: bash examples/maintenance/make_models.sh BERT RERANKER [DIRECTORY]
#
# BERT is the directory of all-MiniLM-L6-v2 (config.json, model.safetensors, vocab.txt; Apache License 2.0). RERANKER is
# the same model, fine-tuned on WorldTree (the teacher of experiments/sentences.toml) and then for one epoch on
# squad-sentences (experiments/squad-sentences.toml at commit ff41f9c). DIRECTORY (default: example_models) receives the intermediate files and, at the end,
# teacher/ and general_student/. Compare them with the ones in examples/ before you replace those. An interrupted run
# continues. No test query is read. The dev queries choose the teacher's checkpoint.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../python_env.sh"
help_for "${BASH_SOURCE[0]}" "$@"
[ $# -ge 2 ] || fail "expected two directories: all-MiniLM-L6-v2 and a re-ranker made from it (--help tells more)"
use_python requirements.txt
BERT="$1"
RERANKER="$2"
OUT="${3:-example_models}"
COLLECTION="$OUT/collection"
LENGTH=96
mkdir -p "$OUT"

module() { PYTHONPATH="$ROOT" "$PYTHON" -m "$@"; }

# shrink OUTPUT MODEL: the model with the collection's most frequent tokens only
shrink() {
    step "$OUT/$1/vocab.txt" module examples.maintenance.cut_vocabulary --model_dir "$2" --tokens 6000 --positions 128 \
        --texts "$COLLECTION/corpus.txt" "$COLLECTION/queries.train.tsv" --output_dir "$OUT/$1"
}

# tokenize SET NAME TEXTS: the features in OUT/NAME.pkl
tokenize() {
    step "$OUT/$2.pkl" run tokenize_to_features.py --set_name "$1" --raw_data_file "$3" \
        --output_features_file "$OUT/$2.pkl" --bert_model_dir "$OUT/bert" --max_seq_length $LENGTH
}

# train OUTPUT START FEATURES [more arguments of distill.py]
train() {
    run distill.py --general_student_model "$OUT/$2" --features_file "$OUT/$3.pkl" --output_student_dir "$OUT/$1" \
        --cache_file_dir "$OUT/cache" --dev_features_file "$OUT/dev.pkl" --dev_qrels_file "$COLLECTION/qrels.dev.txt" \
        --padding masked --train_batch_size 32 --train_loss_step 50 --save_model_step 250 --keep_checkpoints 1 \
        --eval_step 250 --resume "${@:4}"
}

# shape NAME LAYERS HIDDEN_SIZE: the configuration of a model that is compressed from BERT
shape() {
    step "$OUT/$1.json" "$PYTHON" - "$OUT/bert/config.json" "$OUT/$1.json" "$2" "$3" <<'PYTHON'
import json
import pathlib
import sys

source, target, layers, hidden = sys.argv[1:]
config = json.loads(pathlib.Path(source).read_text())
config |= {"num_hidden_layers": int(layers), "hidden_size": int(hidden), "intermediate_size": 4 * int(hidden)}
pathlib.Path(target).write_text(json.dumps(config, indent=2))
PYTHON
}

# general OUTPUT BERT SHAPE: a BERT of this shape, compressed from another one and distilled from it on the passages
general() {
    run general_distill.py --corpus "$COLLECTION/corpus.txt" --teacher_model "$OUT/$2" --student_config "$OUT/$3.json" \
        --compress_teacher --output_student_dir "$OUT/$1" --cache_file_dir "$OUT/cache" --max_seq_length $LENGTH \
        --padding masked --train_batch_size 32 --learning_rate 3e-4 --num_train_epochs 2 --resume
}

step "$COLLECTION/train.examples.tsv" module examples.build_collection --output_dir "$COLLECTION"
step "$OUT/more/train.examples.tsv" module examples.build_collection --output_dir "$OUT/more" --pseudo_queries 4000
shrink bert "$BERT"
shrink reranker "$RERANKER"
tokenize train own "$COLLECTION/train.examples.tsv"
tokenize train more "$OUT/more/train.examples.tsv"
tokenize test dev "$COLLECTION/dev.pairs.tsv"

# The big teacher: the re-ranker, fine-tuned on the training queries
train big reranker own --distill_model finetune --learning_rate 5e-5 --train_batch_size 16 --num_train_epochs 1

# A small BERT: MiniLM, distilled on passages alone
shape small_shape 6 192
general small bert small_shape

# The teacher: the small BERT, distilled from the big teacher on training queries and sentences cut out of the documents
train teacher_float32 small more --distill_model simplified --teacher_model "$OUT/big" --learning_rate 3e-4 \
    --num_train_epochs 1

# The general student: half of the small BERT's layers, distilled from it on passages alone
shape student_shape 3 192
general student_float32 small student_shape

module examples.maintenance.store_float16 --model_dir "$OUT/teacher_float32/best" --output_dir "$OUT/teacher"
module examples.maintenance.store_float16 --model_dir "$OUT/student_float32" --output_dir "$OUT/general_student"
