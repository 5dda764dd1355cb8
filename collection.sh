#!/usr/bin/env bash
# Run the whole pipeline on your own collection: bash collection.sh COLLECTION OUTPUT_DIR
#
# COLLECTION is a directory in the format of MS MARCO document ranking, each file plain or .gz:
#   docs.tsv                       document_id <tab> url <tab> title <tab> body, or document_id <tab> text
#   queries.{train,dev,test}.tsv   query_id <tab> query        qrels.{train,dev,test}.txt   query_id 0 document_id grade
#   bm25.{train,dev,test}.txt      the candidates: TREC runs of any first-stage ranker
# The steps are prepare, tokenize, teacher, general student, one student per method, re-rank, evaluate, report. A step
# is skipped if its result exists; an interrupted step resumes. Of the teacher and each student, the checkpoint that is
# best on the dev queries is used (best/). The table is OUTPUT_DIR/report/table.md. Its row BM25 has the candidates that
# are re-ranked, in their order. With other files or settings, use another OUTPUT_DIR. Only METHODS, MEASURES, DEVICE and
# PROCESSES may change.
#
# Variables:
#   BERT_MODEL       pre-trained BERT, directory or hub id (default google-bert/bert-base-uncased). It supplies the
#                    vocabulary; the teacher is fine-tuned from it, the general student is distilled from it
#   TEACHER_MODEL    an existing fine-tuned teacher; it also selects the relevant passages (default: a new one)
#   STUDENT_MODEL    an existing general student (default: a new one)
#   STUDENT_LAYERS   layers of a new general student, which starts from layers of BERT_MODEL (default 3)
#   METHODS          default "finetune standard tinybert simplified"
#   MEASURES         default "nDCG@10 RR@10 AP"
#   MAX_SEQ_LENGTH   tokens of a pair (default 256)
#   PASSAGE_FLAGS    how documents are split (default "--title --window 150 --stride 75")
#   SAMPLE_FLAGS     more arguments of prepare_examples.py train, such as "--negatives 4 --max_queries 500"
#   DEPTH            candidates to re-rank for each query (default 100)
#   TRAIN_FLAGS      more arguments of distill.py for teacher and students, such as "--bf16 --train_batch_size 16"
#   TEACHER_FLAGS    the same for the teacher only, after TRAIN_FLAGS
#   GENERAL_FLAGS    more arguments of general_distill.py
#   EVAL_STEP        steps between validations on the dev queries (default 1000)
#   DEVICE           auto (default), cpu, or a CUDA index
#   PROCESSES        number of processes, such as the number of GPUs (default 1)
#   PYTHON           Python interpreter; its packages are not checked
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python_env.sh"
help_for "${BASH_SOURCE[0]}" "$@"

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "collection.sh needs bash 4.4 or newer, found $BASH_VERSION"
[ $# = 2 ] || fail "expected two arguments, found $#: bash collection.sh COLLECTION OUTPUT_DIR (see --help)"
[ ! -e "$2" ] || [ -d "$2" ] || fail "$2: is a file; name a directory"
COLLECTION="$1"
OUT="$2"
BERT_MODEL="${BERT_MODEL:-google-bert/bert-base-uncased}"
TEACHER_MODEL="${TEACHER_MODEL:-}"
STUDENT_MODEL="${STUDENT_MODEL:-}"
STUDENT_LAYERS="${STUDENT_LAYERS:-3}"
METHODS="${METHODS:-finetune standard tinybert simplified}"
MEASURES="${MEASURES:-nDCG@10 RR@10 AP}"
MAX_SEQ_LENGTH="${MAX_SEQ_LENGTH:-256}"
DEPTH="${DEPTH:-100}"
EVAL_STEP="${EVAL_STEP:-1000}"
DEVICE="${DEVICE:-auto}"
PROCESSES="${PROCESSES:-1}"
PASSAGE_FLAGS="${PASSAGE_FLAGS:---title --window 150 --stride 75}"
# read -d "" also splits values of several lines, but returns an error at the end of the input
read -r -d "" -a passage_flags <<< "$PASSAGE_FLAGS" || true
read -r -d "" -a sample_flags <<< "${SAMPLE_FLAGS:-}" || true
read -r -d "" -a train_flags <<< "${TRAIN_FLAGS:-}" || true
read -r -d "" -a teacher_flags <<< "${TEACHER_FLAGS:-}" || true
read -r -d "" -a general_flags <<< "${GENERAL_FLAGS:-}" || true
read -r -d "" -a methods <<< "$METHODS" || true
read -r -d "" -a measures <<< "$MEASURES" || true

# file NAME: print its path in the collection, plain or .gz
file() {
    if [ -r "$COLLECTION/$1" ]; then echo "$COLLECTION/$1"; else echo "$COLLECTION/$1.gz"; fi
}
missing=()
for name in docs.tsv {queries.{train,dev,test}.tsv,{qrels,bm25}.{train,dev,test}.txt}; do
    [ -r "$(file "$name")" ] || missing+=("$name")
done
[ "${#missing[@]}" = 0 ] || fail "$COLLECTION: cannot find ${missing[*]}, plain or .gz; bash collection.sh --help \
describes these files"
DOCS="$(file docs.tsv)"

# prepare [arguments]: make training examples, in $PROCESSES processes if a model chooses the passages
prepare() { if [ -n "$TEACHER_MODEL" ]; then launch "$ROOT/prepare_examples.py" "$@"; else run prepare_examples.py "$@"; fi; }
run_on_device() { launch "$ROOT/$1" --device "$DEVICE" "${@:2}"; }

# train OUTPUT STUDENT [more arguments of distill.py]
train() {
    run_on_device distill.py --features_file "$OUT/train.pkl" --general_student_model "$2" --output_student_dir "$1" \
        --dev_features_file "$OUT/dev.pkl" --dev_qrels_file "$(file qrels.dev.txt)" --eval_step "$EVAL_STEP" \
        --cache_file_dir "$OUT/cache" --resume "${train_flags[@]}" "${@:3}"
}

# rerank MODEL NAME: write scores and ranking of the test pairs, NAME.tsv and NAME.trec
rerank() {
    step "$OUT/$2.tsv" run_on_device reranker.py --model_dir "$1" --features_file "$OUT/test.pkl" \
        --output_scores_file "$OUT/$2.tsv" --resume
    step "$OUT/$2.trec" run convert_to_trec_results.py --scores_file "$OUT/$2.tsv" --output_results_file "$OUT/$2.trec"
}

use_python requirements.txt
QRELS_FILE="$(file qrels.test.txt)"
RUN_FILE="$(file bm25.test.txt)"
first=(--distill_model finetune "${train_flags[@]}" "${teacher_flags[@]}")
[ -z "$TEACHER_MODEL" ] || first=(--distill_model "${methods[0]:-}" --teacher_model="$TEACHER_MODEL" "${train_flags[@]}")
check_settings PROCESSES DEVICE STUDENT_LAYERS MAX_SEQ_LENGTH DEPTH EVAL_STEP MEASURES QRELS_FILE RUN_FILE \
    BERT_MODEL TEACHER_MODEL STUDENT_MODEL METHODS COLLECTION OUT \
    PASSAGE_FLAGS SAMPLE_FLAGS TRAIN_FLAGS TEACHER_FLAGS GENERAL_FLAGS \
    -- parse prepare_examples.py train --output=- "${passage_flags[@]}" "${sample_flags[@]}" \
    -- check_numbers distill.py --features_file=- --general_student_model=- --output_student_dir=- "${first[@]}" \
    -- check_numbers general_distill.py --docs=- --teacher_model=- --student_layers 1 --output_student_dir=- \
    "${general_flags[@]}"
VOCABULARY="${TEACHER_MODEL:-$BERT_MODEL}"

step "$OUT/train.tsv" prepare train --docs "$DOCS" --queries "$(file queries.train.tsv)" \
    --qrels "$(file qrels.train.txt)" --candidates "$(file bm25.train.txt)" --output "$OUT/train.tsv" \
    --cache_file_dir "$OUT/cache" ${TEACHER_MODEL:+--filter_model "$TEACHER_MODEL"} \
    ${TEACHER_MODEL:+--device "$DEVICE" --max_seq_length "$MAX_SEQ_LENGTH"} \
    "${passage_flags[@]}" "${sample_flags[@]}"
for split in dev test; do
    step "$OUT/$split.tsv" run prepare_examples.py test --docs "$DOCS" --queries "$(file "queries.$split.tsv")" \
        --candidates "$(file "bm25.$split.txt")" --output "$OUT/$split.tsv" --depth "$DEPTH" \
        --cache_file_dir "$OUT/cache" "${passage_flags[@]}"
done
for split in train dev test; do
    step "$OUT/$split.pkl" run tokenize_to_features.py --set_name $split --raw_data_file "$OUT/$split.tsv" \
        --output_features_file "$OUT/$split.pkl" --bert_model_dir "$VOCABULARY" --max_seq_length "$MAX_SEQ_LENGTH"
done

if [ -z "$TEACHER_MODEL" ]; then
    TEACHER_MODEL="$OUT/teacher/best"
    step "$OUT/teacher/model.safetensors" train "$OUT/teacher" "$BERT_MODEL" --distill_model finetune \
        "${teacher_flags[@]}"
fi
if [ -z "$STUDENT_MODEL" ]; then
    STUDENT_MODEL="$OUT/general"
    step "$STUDENT_MODEL/model.safetensors" run_on_device general_distill.py --docs "$DOCS" \
        --teacher_model "$BERT_MODEL" --student_layers "$STUDENT_LAYERS" --init_from_teacher --resume \
        --output_student_dir "$STUDENT_MODEL" --cache_file_dir "$OUT/cache" "${general_flags[@]}"
fi

# bm25_run: write the ranking before re-ranking, of the same documents: the pairs are in its order. (awk would take the
# name of a file in a directory such as seed=1 for the value of a variable, so it reads standard input.)
bm25_run() {
    awk -F '\t' '{
        end = index($1, "#"); query = substr($1, 1, end - 1); document = substr($1, end + 1); sub(/_[^_]*$/, "", document)
        if (!((query, document) in seen)) {
            seen[query, document] = 1; rank[query]++
            print query, "Q0", document, rank[query], -rank[query], "candidates"
        }
    }' < "$OUT/test.tsv" > "$OUT/.bm25.trec.$$"
    mv "$OUT/.bm25.trec.$$" "$OUT/bm25.trec"
}
step "$OUT/bm25.trec" bm25_run
rerank "$TEACHER_MODEL" run-teacher
systems=(--system BM25 "$OUT/bm25.trec" --system teacher "$OUT/run-teacher.trec" "$TEACHER_MODEL")
for method in "${methods[@]}"; do
    student="$OUT/student-$method"
    step "$student/model.safetensors" train "$student" "$STUDENT_MODEL" --distill_model "$method" \
        --teacher_model "$TEACHER_MODEL"
    rerank "$student/best" "run-$method"
    systems+=(--system "$method" "$OUT/run-$method.trec" "$student/best")
done
run report.py --qrels "$QRELS_FILE" "${systems[@]}" --teacher teacher --baseline BM25 \
    --measures "${measures[@]}" --features_file "$OUT/test.pkl" --device "$DEVICE" --output_dir "$OUT/report"
