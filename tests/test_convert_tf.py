"""convert_tf_checkpoint.py on checkpoints written by TensorFlow, compared with a forward pass in TensorFlow."""
import hashlib
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import random_rows, run_script, tiny_vocabulary, write_features
from safetensors.torch import load_file

import convert_tf_checkpoint
import reranker
from simplified_tinybert.common.files import UserError
from simplified_tinybert.model.batch import Batch
from simplified_tinybert.model.pretrained import load_cross_encoder

LAYERS, HIDDEN, HEADS, INTERMEDIATE, VOCABULARY, LENGTH = 2, 24, 3, 40, 200, 32
CONFIG = {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": HIDDEN,
          "initializer_range": 0.02, "intermediate_size": INTERMEDIATE, "max_position_embeddings": LENGTH,
          "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "type_vocab_size": 2, "vocab_size": VOCABULARY}


@pytest.fixture(scope="module")
def tf():
    import torch._dynamo  # noqa: F401  as in open_checkpoint
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    return pytest.importorskip("tensorflow", reason="needs TensorFlow: pip install tensorflow-cpu")


def bert_variables(seed=0):
    """Random values for the variables of Google's code."""
    random, variables = np.random.default_rng(seed), {}

    def add(name, *shape, mean=0.0):
        variables[name] = (mean + random.normal(scale=0.3, size=shape)).astype(np.float32)

    def add_dense(scope, inputs, outputs):
        add(f"{scope}/kernel", inputs, outputs)
        add(f"{scope}/bias", outputs)

    def add_norm(scope):
        add(f"{scope}/LayerNorm/gamma", HIDDEN, mean=1.0)
        add(f"{scope}/LayerNorm/beta", HIDDEN)

    for name, rows in (("word", VOCABULARY), ("token_type", 2), ("position", LENGTH)):
        add(f"bert/embeddings/{name}_embeddings", rows, HIDDEN)
    add_norm("bert/embeddings")
    for layer in (f"bert/encoder/layer_{number}" for number in range(LAYERS)):
        for name in ("query", "key", "value"):
            add_dense(f"{layer}/attention/self/{name}", HIDDEN, HIDDEN)
        add_dense(f"{layer}/attention/output/dense", HIDDEN, HIDDEN)
        add_norm(f"{layer}/attention/output")
        add_dense(f"{layer}/intermediate/dense", HIDDEN, INTERMEDIATE)
        add_dense(f"{layer}/output/dense", INTERMEDIATE, HIDDEN)
        add_norm(f"{layer}/output")
    add_dense("bert/pooler/dense", HIDDEN, HIDDEN)
    add("output_weights", 2, HIDDEN)
    add("output_bias", 2)
    return variables


def training_variables(variables):
    """Other variables of a checkpoint: of the optimizer and of the pre-training heads."""
    slots = {f"{name}/adam_{slot}": np.ones_like(value) for name, value in variables.items() for slot in "mv"}
    return slots | {"global_step": np.int64(400_000), "cls/predictions/output_bias": np.ones(VOCABULARY, np.float32),
                    "cls/seq_relationship/output_weights": np.ones((2, HIDDEN), np.float32)}


def save_checkpoint(tf, directory, variables, step=400_000, config=CONFIG):
    """Write a directory like that of dl4marco-bert's training."""
    directory.mkdir(exist_ok=True)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, value in variables.items():
            tf.compat.v1.get_variable(name, initializer=tf.constant(value))
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver(max_to_keep=None).save(session, str(directory / "model.ckpt"), global_step=step)
    (directory / "bert_config.json").write_text(json.dumps(config))
    (directory / "vocab.txt").write_text("\n".join(tiny_vocabulary()) + "\n")
    return directory


def tensorflow_logits(tf, checkpoint, tokens, segments, lengths):
    """Logits of Google's BERT of 2018 with dl4marco-bert's head, restored by TensorFlow."""
    tf1 = tf.compat.v1
    with tf.Graph().as_default(), tf1.Session() as session:
        def variable(name):
            with tf1.variable_scope("", reuse=tf1.AUTO_REUSE):
                return tf1.get_variable(name, shape=shapes[name])

        def dense(x, scope):
            return tf.einsum("...i,io->...o", x, variable(f"{scope}/kernel")) + variable(f"{scope}/bias")

        def norm(x, scope):
            mean, variance = tf.nn.moments(x, axes=[-1], keepdims=True)
            return tf.nn.batch_normalization(x, mean, variance, variable(f"{scope}/LayerNorm/beta"),
                                             variable(f"{scope}/LayerNorm/gamma"), 1e-12)

        def heads(x):
            return tf.transpose(tf.reshape(x, [*x.shape[:2], HEADS, HIDDEN // HEADS]), [0, 2, 1, 3])

        shapes = dict(tf.train.list_variables(str(checkpoint)))
        mask = tf.cast(tf.sequence_mask(lengths, tokens.shape[1]), tf.float32)[:, None, None, :]
        x = tf.gather(variable("bert/embeddings/word_embeddings"), tokens)
        x += tf.gather(variable("bert/embeddings/token_type_embeddings"), segments)
        x = norm(x + variable("bert/embeddings/position_embeddings")[:tokens.shape[1]], "bert/embeddings")
        for layer in (f"bert/encoder/layer_{number}" for number in range(LAYERS)):
            query, key, value = (heads(dense(x, f"{layer}/attention/self/{name}"))
                                 for name in ("query", "key", "value"))
            scores = tf.matmul(query, key, transpose_b=True) / np.sqrt(HIDDEN / HEADS) + (1 - mask) * -10000.0
            context = tf.transpose(tf.matmul(tf.nn.softmax(scores), value), [0, 2, 1, 3])
            context = dense(tf.reshape(context, x.shape), f"{layer}/attention/output/dense")
            x = norm(x + context, f"{layer}/attention/output")
            inner = dense(x, f"{layer}/intermediate/dense")
            inner *= 0.5 * (1.0 + tf.math.erf(inner / np.sqrt(2.0)))
            x = norm(x + dense(inner, f"{layer}/output/dense"), f"{layer}/output")
        pooled = tf.tanh(dense(x[:, 0], "bert/pooler/dense"))
        logits = tf.matmul(pooled, variable("output_weights"), transpose_b=True) + variable("output_bias")
        tf1.train.Saver().restore(session, str(checkpoint))
        return session.run(logits)


@pytest.fixture(scope="module")
def checkpoint(tf, tmp_path_factory):
    """Directory with the checkpoint of a fine-tuned ranker."""
    variables = bert_variables()
    return save_checkpoint(tf, tmp_path_factory.mktemp("tf") / "trained", variables | training_variables(variables))


@pytest.fixture(scope="module")
def rows():
    return random_rows(40, LENGTH)


@pytest.fixture(scope="module")
def padded(rows):
    """Tokens, segments and lengths of the rows, as padded arrays."""
    tokens, segments = np.zeros((2, len(rows), LENGTH), np.int64)
    for number, (_, row, query_length, _) in enumerate(rows):
        tokens[number, :len(row)], segments[number, query_length:len(row)] = row, 1
    return tokens, segments, np.array([len(row) for _, row, *_ in rows])


@pytest.fixture(scope="module")
def logits(tf, checkpoint, padded):
    return tensorflow_logits(tf, checkpoint / "model.ckpt-400000", *padded)


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory):
    """Model directory written by the script, in its own process, and the script's output."""
    output = tmp_path_factory.mktemp("converted") / "teacher"
    done = run_script("convert_tf_checkpoint.py", "--tf_checkpoint", checkpoint / "model.ckpt-400000", "--bert_config",
                      checkpoint / "bert_config.json", "--vocab", checkpoint / "vocab.txt", "--output_dir", output)
    assert done.returncode == 0, done.stderr
    return output, done.stdout + done.stderr


def test_logits_are_those_of_tensorflow(converted, padded, logits):
    tokens, segments, lengths = (torch.from_numpy(array) for array in padded)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    model, notes = load_cross_encoder(converted[0])
    with torch.inference_mode():
        ours = model(Batch(tokens, segments, mask)).logits.numpy()
    assert notes == [] and logits.std() > 0.3
    np.testing.assert_allclose(ours, logits, rtol=0, atol=2e-5)


def test_logits_of_transformers_are_those_of_tensorflow(converted, padded, logits):
    from transformers import AutoModelForSequenceClassification
    tokens, segments, lengths = (torch.from_numpy(array) for array in padded)
    model, report = AutoModelForSequenceClassification.from_pretrained(converted[0], output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.inference_mode():
        library_logits = model.eval()(input_ids=tokens, token_type_ids=segments,
                              attention_mask=(torch.arange(LENGTH) < lengths[:, None]).long()).logits.numpy()
    np.testing.assert_allclose(library_logits, logits, rtol=0, atol=2e-5)


def test_scores_of_the_reranker_are_those_of_tensorflow(converted, rows, logits, tmp_path, run_here):
    file = write_features(tmp_path / "test.pkl", rows, set_name="test")
    run_here(reranker, "--model_dir", converted[0], "--features_file", file, "--output_scores_file",
             tmp_path / "scores.tsv", "--device", "cpu")
    scores = [float(line.split("\t")[2]) for line in (tmp_path / "scores.tsv").read_text().splitlines()]
    wide = logits.astype(np.float64)
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(wide[:, 0] - wide[:, 1])), rtol=0, atol=1e-5)


def test_the_record_lists_the_inputs_and_skipped_variables(converted, checkpoint):
    output, printed = converted
    record = json.loads((output / "run.json").read_text())
    assert record["not_used"] == {"Adam's slots": 2 * len(bert_variables()), "global_step": 1, "pre-training heads": 2}
    assert sorted(os.path.basename(path) for path in record["inputs"]) == [
        "bert_config.json", "model.ckpt-400000.data-00000-of-00001", "model.ckpt-400000.index", "vocab.txt"]
    for path, digest in record["inputs"].items():
        assert digest == hashlib.sha256((checkpoint / os.path.basename(path)).read_bytes()).hexdigest()
    assert [line.split()[0] for line in printed.splitlines()] == ["model", "not", "written"]    # TensorFlow is silent
    assert f"{2 * len(bert_variables())} of Adam's slots" in printed and "2 classes" in printed
    assert (output / "vocab.txt").read_bytes() == (checkpoint / "vocab.txt").read_bytes()
    assert json.loads((output / "tokenizer_config.json").read_text())["do_lower_case"] is True
    assert "re-ranker" in (output / "README.md").read_text()


def convert(run_here, directory, output, *more):
    return run_here(convert_tf_checkpoint, "--tf_checkpoint", directory, "--output_dir", output, *more)


def test_the_newest_checkpoint_of_a_directory_is_converted(tf, tmp_path, run_here):
    directory = save_checkpoint(tf, tmp_path / "tf", bert_variables(1), step=1)
    save_checkpoint(tf, directory, bert_variables(2), step=2)
    convert(run_here, directory, tmp_path / "out", "--no-do_lower_case")
    bias = load_file(tmp_path / "out" / "model.safetensors")["classifier.bias"]
    np.testing.assert_array_equal(bias.numpy(), bert_variables(2)["output_bias"])
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["do_lower_case"] is False
    (directory / "checkpoint").unlink()
    with pytest.raises(UserError, match=r"model.ckpt-1, model.ckpt-2.*--tf_checkpoint"):
        convert(run_here, directory, tmp_path / "another")
    convert(run_here, directory / "model.ckpt-1.index", tmp_path / "another")
    for path in directory.glob("model.ckpt-1.*"):
        path.unlink()
    convert(run_here, directory, tmp_path / "only one left")


def test_a_pre_trained_model_is_written_without_a_classifier(tf, tmp_path, run_here):
    variables = {name: value for name, value in bert_variables().items() if not name.startswith("output_")}
    directory = save_checkpoint(tf, tmp_path / "tf", variables | training_variables(variables))
    assert "without a classifier" in convert(run_here, directory, tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert len(names) == len(variables) and not any(name.startswith("classifier") for name in names)
    with pytest.raises(UserError, match="lack classifier.bias, classifier.weight; .*not fine-tuned"):
        load_cross_encoder(tmp_path / "out")
    _, notes = load_cross_encoder(tmp_path / "out", new_head=torch.Generator())      # as distill.py does
    assert notes == ["newly initialised: classifier.bias, classifier.weight"]
    from transformers import AutoModel
    model, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert "pipeline_tag" not in (tmp_path / "out" / "README.md").read_text()


def test_half_precision_checkpoints_are_converted_to_float32(tf, tmp_path, run_here):
    variables = bert_variables() | {"output_bias": tf.cast([0.5, -1.5], tf.bfloat16).numpy()}
    convert(run_here, save_checkpoint(tf, tmp_path / "tf", variables), tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["classifier.bias"].tolist() == [0.5, -1.5] and weights["classifier.bias"].dtype == torch.float32


@pytest.mark.parametrize("change, config, messages", [
    ({"output_bias": None}, {}, ["lacks output_bias"]),
    ({"bert/pooler/dense/kernel": None, "output_weights": np.zeros((2, 12), np.float32)}, {},
     ["lacks bert/pooler/dense/kernel", "output_weights has shape [2, 12]; expected [2, 24]"]),
    ({"bert/encoder/layer_0/intermediate/dense/kernel": np.zeros((INTERMEDIATE, HIDDEN), np.float32)}, {},
     ["layer_0/intermediate/dense/kernel has shape [40, 24]; expected [24, 40]"]),
    ({"rank/output_weights": np.zeros(2, np.float32)}, {}, ["holds rank/output_weights"]),
    ({"model/layer/.ATTRIBUTES/VARIABLE_VALUE": np.zeros(2, np.float32)}, {}, ["TensorFlow 2 object checkpoint"]),
    ({"output_bias": np.array([1, 2])}, {}, ["output_bias holds int64"]),
    ({"output_bias": np.array([1, np.nan], np.float32)}, {}, ["output_bias holds NaN or infinite"]),
    ({}, {"num_hidden_layers": 1}, ["holds bert/encoder/layer_1/attention/output/LayerNorm/beta"]),
    ({}, {"num_hidden_layers": 3}, ["lacks bert/encoder/layer_2/attention/output/LayerNorm/beta"]),
    ({}, {"max_position_embeddings": 512}, ["position_embeddings has shape [32, 24]; expected [512, 24]"]),
    ({}, {"hidden_size": 48}, ["word_embeddings has shape [200, 24]; expected [200, 48]", "more problems"]),
])
def test_all_misfits_are_listed_and_nothing_is_written(tf, tmp_path, run_here, change, config, messages):
    variables = {name: value for name, value in (bert_variables() | change).items() if value is not None}
    directory = save_checkpoint(tf, tmp_path / "tf", variables, config=CONFIG | config)
    with pytest.raises(UserError) as error:
        convert(run_here, directory, tmp_path / "out")
    assert all(message in str(error.value) for message in messages), error.value
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file, message", [("data-00000-of-00001", "cannot read .*data file is damaged"),
                                           ("index", "model.ckpt-400000.index: is damaged")])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_files_are_refused(tf, tmp_path, run_here, file, damage, message):
    directory = save_checkpoint(tf, tmp_path / "tf", bert_variables())
    path = directory / f"model.ckpt-400000.{file}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xff
    path.write_bytes(content[:len(content) // 2] if damage == "cut" else content)
    with pytest.raises(UserError, match=message):
        convert(run_here, directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def unread(tmp_path):
    """A directory that passes all checks that do not need TensorFlow."""
    directory = tmp_path / "tf"
    directory.mkdir()
    for name in ("model.ckpt-1.index", "model.ckpt-1.data-00000-of-00002", "model.ckpt-1.data-00001-of-00002"):
        (directory / name).write_bytes(b"\0")
    (directory / "bert_config.json").write_text(json.dumps(CONFIG))
    (directory / "vocab.txt").write_text("\n".join(tiny_vocabulary()) + "\n")
    return directory


@pytest.mark.parametrize("name, content, message", [
    ("bert_config.json", None, "bert_config.json: .*--bert_config"),
    ("bert_config.json", "{", "bert_config.json: is not a valid"),
    ("vocab.txt", None, "vocab.txt: .*--vocab"), ("tokenizer.json", "{}", "also holds tokenizer.json, which replaces"),
    ("vocab.txt", "a\nb\n", "lacks .UNK., .CLS., .SEP."),
    ("vocab.txt", "\n".join([*tiny_vocabulary(), "more"]),
     "vocab.txt: has 201 tokens, but the embedding matrix has 200 rows .*bert_config.json"),
    ("model.ckpt-1.index", None, "tf: holds no checkpoint"),
    ("model.ckpt-1.data-00001-of-00002", None, "found 1 data files .*, expected 2"),
    (".", None, "tf: no such checkpoint; .*tf.index"),
    ("../out", "", "out: is a file"),
    ("../out/model.safetensors", "", "out: is not empty"),
])
def test_input_errors_are_found_without_tensorflow(unread, run_here, monkeypatch, name, content, message):
    monkeypatch.setitem(sys.modules, "tensorflow", None)            # importing it fails
    path = unread / name
    if name == ".":
        shutil.rmtree(unread)
    elif content is None:
        path.unlink()
    else:
        path.resolve().parent.mkdir(exist_ok=True)
        path.resolve().write_text(content)
    with pytest.raises(UserError, match=message):
        convert(run_here, unread, unread.parent / "out")


@pytest.mark.parametrize("name", ["model.ckpt-1.index", "model.ckpt-1.data-00001-of-00002"])
def test_git_lfs_pointers_are_found_without_tensorflow(unread, run_here, name):
    (unread / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=f"{name}: is a Git LFS pointer"):
        convert(run_here, unread, unread.parent / "out")
    assert not (unread.parent / "out").exists()


def test_the_message_without_tensorflow_says_what_to_install(unread, run_here, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match="pip install tensorflow-cpu"):
        convert(run_here, unread, unread.parent / "out")
    assert not (unread.parent / "out").exists()


def test_the_vocabulary_must_be_named_vocab_txt(unread, run_here):
    with pytest.raises(UserError, match="bert_config.json: expected .*vocab.txt"):
        convert(run_here, unread, unread.parent / "out", "--vocab", unread / "bert_config.json")
