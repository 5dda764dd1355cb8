"""Model directories: layouts that load, files that are refused, and the output of save_cross_encoder."""
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, run_script, tiny_vocabulary, words
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder as SentenceCrossEncoder
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
)

from simplified_tinybert.common.files import UserError
from simplified_tinybert.data.features import Examples
from simplified_tinybert.model.batch import Batch
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.model.configuration import read_config
from simplified_tinybert.model.hub import find_model
from simplified_tinybert.model.pretrained import fit_projections, load_cross_encoder, save_cross_encoder
from simplified_tinybert.model.weights import canonical_names, weight_files, weights_checksum
from simplified_tinybert.tokenization.pairs import CachedTokenizer, tokenize
from simplified_tinybert.tokenization.tokenizer_files import load_vocabulary

NAME = "student_2x24"
WEIGHTS, CONFIG = load_file(DATA / f"{NAME}.safetensors"), json.loads((DATA / f"{NAME}.config.json").read_text())


@pytest.fixture
def directory(tmp_path) -> Path:
    """A directory with the configuration and the vocabulary of a golden student, but no weights."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "vocab.txt").write_text("\n".join(tiny_vocabulary()) + "\n")
    return path


@pytest.fixture
def student(golden_models) -> CrossEncoder:
    return load_cross_encoder(golden_models[NAME])[0]


def save(directory, weights):
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / "model.safetensors")
    return directory


def renamed_weights(rename):
    """The golden weights, renamed by a function that returns None for weights to leave out."""
    renamed = ((rename(name), tensor) for name, tensor in WEIGHTS.items())
    return {name: tensor.clone() for name, tensor in renamed if name}


def without(*prefixes):
    return renamed_weights(lambda name: None if name.startswith(prefixes) else name)


def has_weights(model, weights=WEIGHTS):
    """Whether the parameters of the model are exactly these weights."""
    found, expected = dict(model.named_parameters()), canonical_names(weights)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def error_of(directory, **options):
    with pytest.raises(UserError) as raised:
        load_cross_encoder(directory, **options)
    assert str(directory) in str(raised.value)
    return str(raised.value)


def random_pairs(count=12, seed=3):
    """Texts of random pairs of words of the tiny vocabulary, and the pairs as input lines."""
    generator = np.random.default_rng(seed)
    texts = [tuple(words(generator.integers(5, 200, generator.integers(1, 20)).tolist()) for _ in range(2))
             for _ in range(count)]
    return texts, [f"q#{number}\t{query}\t{passage}" for number, (query, passage) in enumerate(texts)]


def batch_of(directory, lines, max_seq_length=32):
    vocabulary = load_vocabulary(directory)
    examples: Examples = tokenize(lines, CachedTokenizer(vocabulary, max_seq_length))
    return examples.batch(np.arange(len(examples)))


# Layouts that load


def test_safetensors(golden_models):
    model, notes = load_cross_encoder(golden_models[NAME])
    assert has_weights(model) and notes == [] and not model.training
    assert not (golden_models[NAME] / "fit_dense.safetensors").exists() and len(model.projections) == 1


OLD_NAMES = {
    "unchanged": lambda name: name,
    "DataParallel": lambda name: "module." + name,
    "gamma and beta": lambda name: re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma",
                                            re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name)),
    "bare encoder": lambda name: name.removeprefix("bert."),
    "DataParallel, gamma": lambda name: "module." + re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name),
    "list of one projection": lambda name: name.replace("fit_dense.", "fit_denses.0."),
}


@pytest.mark.parametrize("names", OLD_NAMES)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "legacy pytorch_model.bin"])
@pytest.mark.parametrize("config", ["config.json", "bert_config.json"])
def test_layouts(directory, names, file, config):
    (directory / "config.json").rename(directory / config)
    weights = renamed_weights(OLD_NAMES[names])
    if file == "model.safetensors":
        save(directory, weights)
    else:
        torch.save(weights, directory / "pytorch_model.bin", _use_new_zipfile_serialization="legacy" not in file)
    model, notes = load_cross_encoder(directory)
    assert has_weights(model) and notes == []


def test_buffers_and_pretraining_heads_are_ignored(directory):
    extra = {"bert.embeddings.position_ids": torch.arange(64)[None],
             "bert.embeddings.token_type_ids": torch.zeros(1, 64),
             "cls.predictions.bias": torch.ones(200), "cls.predictions.transform.LayerNorm.gamma": torch.ones(24),
             "cls.seq_relationship.weight": torch.ones(2, 24)}
    model, notes = load_cross_encoder(save(directory, WEIGHTS | extra))
    assert has_weights(model)
    assert len(notes) == 1 and notes[0].startswith("3 tensors") and "cls.predictions.bias" in notes[0]


def test_embedding_position_ids_of_a_bare_encoder(directory):
    assert has_weights(load_cross_encoder(save(directory, WEIGHTS | {"embeddings.position_ids": torch.arange(64)}))[0])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_projections(directory, count):
    one, many = "fit_dense.{}", "fit_denses.{}.{}"
    values = {(number, kind): torch.randn((48, 24) if kind == "weight" else 48)
              for number in range(count) for kind in ("weight", "bias")}
    names = {key: one.format(key[1]) if count == 1 else many.format(*key) for key in values}
    model, _ = load_cross_encoder(save(directory, without("fit_dense.") | {names[key]: values[key] for key in values}))
    assert len(model.projections) == count
    for (number, kind), tensor in values.items():
        assert torch.equal(getattr(model.projections[number], kind), tensor)


@pytest.mark.parametrize("missing", ["fit_denses.1.weight", "fit_denses.1.bias", "fit_denses.0.weight"])
def test_incomplete_projections_are_refused(directory, missing):
    values = {f"fit_denses.{number}.{kind}": torch.zeros((48, 24) if kind == "weight" else 48)
              for number in range(3) for kind in ("weight", "bias")}
    del values[missing]
    assert "projections." + missing[11:12] in error_of(save(directory, without("fit_dense.") | values))


@pytest.fixture
def sharded(directory):
    names = sorted(WEIGHTS)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for shard, held in shards.items():
        save_file({name: WEIGHTS[name] for name in held}, directory / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_sharded_safetensors(sharded):
    assert has_weights(load_cross_encoder(sharded)[0])


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "model.safetensors.index.json: lists missing files (model-00002-of-00002.safetensors)" in error_of(sharded)


def test_shards_may_be_in_a_directory_of_their_own(sharded):
    index = sharded / "model.safetensors.index.json"
    shards = sorted(sharded.glob("model-*"))
    (sharded / "parts").mkdir()
    for shard in shards:
        shard.rename(sharded / "parts" / shard.name)
    index.write_text(index.read_text().replace('"model-', '"parts/model-'))
    assert weight_files(sharded) == sorted((sharded / "parts").iterdir())
    assert has_weights(load_cross_encoder(sharded)[0])
    for outside in ("../model-1.safetensors", str(shards[0])):
        index.write_text(json.dumps({"weight_map": {"a": outside}}))
        assert f"lists files outside its directory ({outside})" in error_of(sharded)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"a": 5}}', '{"weight_map": {}}',
                                   '{"weight_map": []}', '{"weight_map": {"a": "../../etc/passwd"}}'])
def test_unusable_index(sharded, index):
    (sharded / "model.safetensors.index.json").write_text(index)
    assert "index" in error_of(sharded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(directory, dtype):
    model, _ = load_cross_encoder(save(directory, {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}))
    assert has_weights(model, {name: tensor.to(dtype).float() for name, tensor in WEIGHTS.items()})


def test_the_checkpoint_determines_the_number_of_classes(directory):
    single = {"classifier.weight": torch.ones(1, 24), "classifier.bias": torch.zeros(1)}
    model, _ = load_cross_encoder(save(directory, WEIGHTS | single))
    assert model.config.num_labels == 1 and model.classifier.out_features == 1


# Weights that do not fit


@pytest.mark.parametrize("name", ["classifier.weight", "classifier.bias"])
def test_a_teacher_without_classifier_is_refused(directory, name):
    message = error_of(save(directory, without(name)))
    assert f"lack {name}; " in message and "not fine-tuned" in message


@pytest.mark.parametrize("name", sorted(name for name in WEIGHTS if not name.startswith("fit_dense")))
def test_a_missing_parameter_is_refused(directory, name):
    save(directory, without(name))
    assert f"the weights lack {name}" in error_of(directory)
    if not name.startswith(("classifier.", "bert.pooler.")):
        assert f"the weights lack {name}" in error_of(directory, new_head=torch.Generator())


def test_all_missing_parameters_are_listed(directory):
    names = [name for name in WEIGHTS if name.startswith("bert.encoder.layer.0.attention.")]
    message = error_of(save(directory, without(*names)))
    assert len(message.splitlines()) == 1 and "(10 in all)" in message
    assert all(f"layer.0.attention.{name}" in message for name in ("output.LayerNorm.bias", "output.dense.bias"))


@pytest.mark.parametrize("name", ["extra.weight", "bert.encoder.layer.2.output.dense.bias", "classifier.gamma2",
                                  "bert.gammas.weight", "embeddings.gamma_ray"])
def test_unexpected_parameters_are_listed(directory, name):
    message = error_of(save(directory, WEIGHTS | {name: torch.zeros(3), "another.tensor": torch.zeros(1)}))
    assert len(message.splitlines()) == 1 and "another.tensor" in message
    assert canonical_names({name: torch.zeros(1)}).popitem()[0] in message


def test_names_that_only_contain_gamma_or_beta_are_kept():
    names = ["bert.gamma_ray.weight", "my_beta.bias", "x.gammas", "alphabeta", "gamma", "x.beta.weight"]
    assert list(canonical_names(dict.fromkeys(names))) == names
    assert list(canonical_names({"x.LayerNorm.gamma": 1, "x.LayerNorm.beta": 2})) == ["x.LayerNorm.weight",
                                                                                       "x.LayerNorm.bias"]


@pytest.mark.parametrize(("name", "shape"), [
    ("bert.embeddings.word_embeddings.weight", (201, 24)), ("bert.pooler.dense.bias", (25,)),
    ("classifier.bias", (3,)), ("classifier.weight", (2, 25)), ("classifier.weight", ()),
    ("bert.embeddings.position_embeddings.weight", (512, 24)),
])
def test_wrong_shapes_are_listed(directory, name, shape):
    message = error_of(save(directory, WEIGHTS | {name: torch.zeros(shape)}))
    assert f"{name} has shape {list(shape)}" in message and str(WEIGHTS[name].shape[0]) in message
    assert len(message.splitlines()) == 1


def test_integer_weights_are_refused(directory):
    message = error_of(save(directory, WEIGHTS | {"classifier.weight": torch.ones(2, 24, dtype=torch.int64)}))
    assert "torch.int64 in classifier.weight" in message


def test_a_general_student_gets_a_new_head(directory):
    save(directory, without("classifier.", "bert.pooler.") | {"cls.predictions.bias": torch.zeros(200)})

    def load(seed):
        return load_cross_encoder(directory, new_head=torch.Generator().manual_seed(seed))

    (first, notes), (again, _), (other, _) = load(1), load(1), load(2)
    assert notes[1:] == ["newly initialised: bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias, "
                         "classifier.weight"] and "pre-training heads" in notes[0]
    assert has_weights(first, again.state_dict()) and not torch.equal(first.classifier.weight, other.classifier.weight)
    assert not first.classifier.bias.any() and not first.bert.pooler.dense.bias.any()
    assert 0.01 < first.bert.pooler.dense.weight.std() < 0.03
    kept = {name: tensor for name, tensor in WEIGHTS.items() if name.startswith(("bert.emb", "bert.enc", "fit_dense"))}
    found = dict(first.named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in canonical_names(kept).items())
    assert "lack bert.pooler.dense.bias" in error_of(directory)


def test_a_new_head_is_independent_of_the_global_random_state(directory):
    save(directory, without("classifier."))
    torch.manual_seed(5)
    first, _ = load_cross_encoder(directory, new_head=torch.Generator().manual_seed(1))
    torch.randn(100)
    second, _ = load_cross_encoder(directory, new_head=torch.Generator().manual_seed(1))
    assert torch.equal(first.classifier.weight, second.classifier.weight)


def test_projections_are_kept_if_they_fit(student):
    before = student.projections[0].weight.clone()
    assert fit_projections(student, 48, torch.Generator()) == [] and torch.equal(student.projections[0].weight, before)
    note, = fit_projections(student, 96, torch.Generator())
    assert "newly initialised: fit_dense, 24 → 96" in note and "(24, 48)" in note
    assert student.projections[0].weight.shape == (96, 24)


# Files that must be refused


class RunsCommand:
    """A pickle of it creates a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle", "pickle 4", "among tensors"])
def test_weights_that_run_code_are_refused(directory, tmp_path, layout):
    created, path = tmp_path / "run", directory / "pytorch_model.bin"
    hostile = WEIGHTS | {"x": RunsCommand(created)} if layout == "among tensors" else RunsCommand(created)
    if layout.startswith("pickle"):
        path.write_bytes(pickle.dumps(hostile, protocol=4 if "4" in layout else 2))
    else:
        torch.save(hostile, path, _use_new_zipfile_serialization=layout != "legacy")
    message = error_of(directory)
    assert not created.exists() and "pytorch_model.bin" in message and "could run code" in message
    try:
        torch.load(path, weights_only=False)
    except Exception:                                   # noqa: BLE001 raised after the command has run
        pass
    assert created.exists()                             # the file was dangerous


@pytest.mark.parametrize("layout", ["safetensors", "zip", "legacy"])
def test_truncated_weights_are_refused(directory, layout):
    path = directory / ("model.safetensors" if layout == "safetensors" else "pytorch_model.bin")
    if layout == "safetensors":
        save(directory, WEIGHTS)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=layout == "zip")
    content = path.read_bytes()
    lengths = {0, 1, 2, 4, 7, 8, 9, 100, 1000, 5000, *range(10_000, len(content), 9_973), len(content) - 100,
               len(content) - 1}
    for length in sorted(lengths):
        path.write_bytes(content[:length])
        assert path.name in error_of(directory), length


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x80\x02.", b"PK\x03\x04", bytes(100), pickle.dumps([1]),
                                     b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_files_that_hold_no_weights(directory, name, content):
    (directory / name).write_bytes(content)
    assert name in error_of(directory)


@pytest.mark.parametrize("content", [[torch.ones(1)], {1: torch.ones(1)}, torch.ones(2),
                                     WEIGHTS | {"classifier.weight": torch.ones(2, 24).to_sparse()},
                                     WEIGHTS | {"classifier.weight": torch.ones(2, 24, device="meta")}])
def test_files_without_a_state_dict(directory, content):
    torch.save(content, directory / "pytorch_model.bin")
    assert "expected a state dict" in error_of(directory)


@pytest.mark.parametrize(("content", "expected"), [
    ("{", "not a valid"), ("[]", "not a valid"), ('"text"', "not a valid"), ("null", "not a valid"),
    ("", "is empty"), ("\ud800", "not a valid"), ({"model_type": "distilbert"}, "distilbert"),
    ({"model_type": None}, "of type None"), ({"position_embedding_type": "relative_key"}, "relative_key"),
    ({"hidden_size": "wide"}, "not a valid"), ({"hidden_size": 24.5}, "not a valid"),
    ({"vocab_size": None}, "not a valid"),
    ({"hidden_act": "prelu"}, "hidden_act is 'prelu', which has trained parameters"),
    ({"hidden_act": "swoosh"}, "hidden_act is 'swoosh'"), ({"num_attention_heads": 5}, "num_attention_heads, 5"),
    ({"num_attention_heads": 0}, "not a valid"), ({"hidden_size": -24}, "not a valid"),
    ({"vocab_size": 10 ** 13}, "10000000000000"), ({"hidden_dropout_prob": 7.0}, "7.0"),
    ({"attention_probs_dropout_prob": 7.0}, "7.0"), ({"classifier_dropout": 7.0}, "classifier_dropout is 7.0"),
    ({"initializer_range": -1.0}, "initializer_range is -1.0"), ({"pad_token_id": 500}, "pad_token_id is 500"),
    ({"hidden_size": 48}, "hidden_size is 24; the configuration says 48"),
    ({"num_hidden_layers": 1}, "num_hidden_layers is 2; the configuration says 1"),
    ({"num_hidden_layers": 3}, "num_hidden_layers is 2; the configuration says 3"),
])
def test_configurations_that_do_not_fit(directory, content, expected):
    text = content if isinstance(content, str) else json.dumps(CONFIG | content)
    (save(directory, WEIGHTS) / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert expected in error_of(directory)


def test_directories_without_a_model(tmp_path, directory):
    assert "holds no weights" in error_of(directory)
    (directory / "config.json").unlink()
    assert "holds neither config.json nor bert_config.json" in error_of(directory)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere", "a/b/c", "~/nowhere", "nobody/nothing",
                                  "no body/nothing!", "../nowhere/model", "a/../b", "nobody/no--thing", "--/--"])
def test_models_that_cannot_be_found(name):
    with pytest.raises(UserError, match=re.escape(name)) as raised:
        find_model(name)
    assert len(str(raised.value).splitlines()) == 1


def test_a_file_is_not_a_model_directory(directory):
    with pytest.raises(UserError, match=f"is a file; .*: {re.escape(str(directory))}$"):
        find_model(str(directory / "config.json"))
    assert find_model(str(directory)) == directory


# Saving


@pytest.fixture(params=["uncased", "bert_config.json alone"])
def saved(request, golden_models, directory, tmp_path, student):
    """A student as distill.py saves it, from either layout."""
    source = golden_models[NAME]
    if "alone" in request.param:
        (directory / "config.json").rename(directory / "bert_config.json")
        torch.save(WEIGHTS, directory / "pytorch_model.bin")
        source = directory
    save_cross_encoder(load_cross_encoder(source)[0], tmp_path / "saved", source, lower_case=True, card="# A card\n")
    return tmp_path / "saved"


def test_saved_files(saved):
    assert set(os.listdir(saved)) == {"config.json", "model.safetensors", "fit_dense.safetensors", "vocab.txt",
                                      "tokenizer_config.json", "README.md"}
    config = json.loads((saved / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("bert", ["BertForSequenceClassification"])
    assert (saved / "README.md").read_text() == "# A card\n"
    assert set(load_file(saved / "fit_dense.safetensors")) == {"fit_dense.weight", "fit_dense.bias"}
    assert BertConfig.from_pretrained(saved).num_labels == 2


def test_other_libraries_compute_the_same_logits(saved):
    texts, lines = random_pairs()
    batch = batch_of(saved, lines)
    assert batch.has_padding
    with torch.inference_mode():
        ours = load_cross_encoder(saved)[0](batch).logits
        theirs, loading = AutoModelForSequenceClassification.from_pretrained(saved, output_loading_info=True)
        assert not any(loading.values()), loading
        theirs = theirs.eval()(input_ids=batch.input_ids, token_type_ids=batch.token_type_ids,
                               attention_mask=batch.attention_mask).logits
    assert theirs.shape == (12, 2) and ours.std() > 1e-3
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


def test_sentence_transformers_gives_the_same_scores(saved):
    texts, lines = random_pairs()
    texts = [pair for pair in texts if sum(len(text.split()) for text in pair) <= 29]   # it truncates differently
    lines = [f"q#{number}\t{query}\t{passage}" for number, (query, passage) in enumerate(texts)]
    assert len(texts) > 6
    with torch.inference_mode():
        ours = load_cross_encoder(saved)[0](batch_of(saved, lines)).logits
    model = SentenceCrossEncoder(str(saved), device="cpu")
    theirs = model.predict(texts, activation_fn=torch.nn.Identity())
    assert theirs.shape == ours.shape
    assert np.allclose(ours.numpy(), theirs, rtol=0, atol=1e-5)


def test_the_saved_tokenizer_gives_the_same_ids(saved):
    theirs, vocabulary = AutoTokenizer.from_pretrained(saved), load_vocabulary(saved)
    texts, lines = random_pairs(30)
    unusual = "W7  w8,w9", "W10.\u00a0w11 w\u00fc12 w13\u732b"
    examples = tokenize([*lines, "\t".join(("q#unusual", *unusual))], CachedTokenizer(vocabulary, 64))
    texts.append(unusual)
    for number, (query, passage) in enumerate(texts):
        encoded = theirs(query, passage)
        assert encoded["input_ids"] == examples.tokens[examples.offsets[number]:examples.offsets[number + 1]].tolist()
        assert encoded["token_type_ids"].index(1) == examples.query_lengths[number]
    assert theirs.model_max_length == 64


@pytest.mark.parametrize("saved", ["bert_config.json alone"], indirect=True)
def test_reranker_gives_the_probabilities_of_transformers(saved, tmp_path):
    _, lines = random_pairs()
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    for done in (run_script("tokenize_to_features.py", "--set_name", "test", "--raw_data_file", tmp_path / "pairs.tsv",
                            "--output_features_file", tmp_path / "f", "--bert_model_dir", saved,
                            "--max_seq_length", 32),
                 run_script("reranker.py", "--model_dir", saved, "--features_file", tmp_path / "f", "--device", "cpu",
                            "--output_scores_file", tmp_path / "scores")):
        assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in (tmp_path / "scores").read_text().splitlines()]
    batch, model = batch_of(saved, lines), AutoModelForSequenceClassification.from_pretrained(saved).eval()
    with torch.inference_mode():
        expected = model(batch.input_ids, batch.attention_mask, batch.token_type_ids).logits.softmax(1)[:, 1]
    assert [row[:2] for row in rows] == [["q", str(number)] for number in range(12)]
    assert np.allclose([float(row[2]) for row in rows], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"model_input_names": ["input_ids", "attention_mask"]},
                                      {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": None}])
def test_without_token_types_all_tokens_have_the_same_segment(saved, capsys, settings):
    """As in transformers, whose tokenizer then gives the model none."""
    BertTokenizer.from_pretrained(saved).backend_tokenizer.save(str(saved / "tokenizer.json"))
    content = json.loads((saved / "tokenizer_config.json").read_text()) | settings
    (saved / "tokenizer_config.json").write_text(json.dumps({name: value for name, value in content.items() if value}))
    texts = [pair for pair in random_pairs()[0] if sum(len(text.split()) for text in pair) <= 29]   # not truncated
    lines = [f"q#{number}\t{query}\t{passage}" for number, (query, passage) in enumerate(texts)]
    library = AutoTokenizer.from_pretrained(saved)
    encoded = library(*map(list, zip(*texts)), padding=True, return_tensors="pt")
    assert "token_type_ids" not in encoded
    with torch.inference_mode():
        theirs = AutoModelForSequenceClassification.from_pretrained(saved).eval()(**encoded).logits
        ours = load_cross_encoder(saved)[0](batch_of(saved, lines)).logits
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)
    assert "the same segment, because model_input_names lacks token_type_ids" in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, 1, 3])
def test_saving_and_loading_is_lossless(golden_models, tmp_path, student, count):
    student.projections = torch.nn.ModuleList([torch.nn.Linear(24, 48) for _ in range(count)])
    save_cross_encoder(student, tmp_path / "saved", golden_models[NAME], lower_case=True)
    loaded, notes = load_cross_encoder(tmp_path / "saved")
    assert has_weights(loaded, student.state_dict()) and notes == [] and len(loaded.projections) == count
    save_cross_encoder(loaded, tmp_path / "again", tmp_path / "saved", lower_case=True)
    assert weights_checksum(tmp_path / "again") == weights_checksum(tmp_path / "saved")
    for name in os.listdir(tmp_path / "saved"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes(), name


def test_saving_replaces_another_model(golden_models, tmp_path, student):
    save_cross_encoder(student, tmp_path, golden_models[NAME], lower_case=True)
    student.projections = torch.nn.ModuleList()
    student.classifier.bias.data += 1
    save_cross_encoder(student, tmp_path, golden_models[NAME], lower_case=True)
    assert has_weights(load_cross_encoder(tmp_path)[0], student.state_dict())


def test_saving_into_the_directory_it_came_from(golden_models, tmp_path):
    shutil.copytree(golden_models[NAME], tmp_path / "model")
    model, _ = load_cross_encoder(tmp_path / "model")
    save_cross_encoder(model, tmp_path / "model", tmp_path / "model", lower_case=True)
    assert has_weights(load_cross_encoder(tmp_path / "model")[0])
    assert load_vocabulary(tmp_path / "model").token_ids["w7"] == 7


def test_double_precision_is_saved(golden_models, tmp_path):
    model, _ = load_cross_encoder(golden_models[NAME], dtype=torch.float64)
    save_cross_encoder(model, tmp_path, None, lower_case=True)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float64"
    assert has_weights(load_cross_encoder(tmp_path, dtype=torch.float64)[0], model.state_dict())


@pytest.mark.parametrize("relu", [True, False])
def test_the_type_of_the_head_is_saved(golden_models, tmp_path, relu):
    model, _ = load_cross_encoder(golden_models[NAME])
    model.config.pooled_relu = relu
    save_cross_encoder(model, tmp_path, golden_models[NAME], lower_case=True)
    loaded, _ = load_cross_encoder(tmp_path)
    assert loaded.config.pooled_relu is relu and read_config(tmp_path).pooled_relu is relu
    batch = batch_of(tmp_path, random_pairs()[1])
    assert torch.equal(loaded(batch).logits, model(batch).logits)
    loaded.config.pooled_relu = not relu
    assert not torch.allclose(loaded(batch).logits, model(batch).logits)


@pytest.mark.parametrize("source_settings", [None, {}, {"do_lower_case": True},
                                             {"do_lower_case": False, "clean_up_tokenization_spaces": True}])
@pytest.mark.parametrize("lower_case", [True, False])
def test_the_student_has_the_casing_of_training(golden_models, tmp_path, student, source_settings, lower_case):
    source = tmp_path / "source"
    source.mkdir()
    tokens = [*tiny_vocabulary()[:196], "Paris", "paris", "W", "w"]
    (source / "vocab.txt").write_text("\n".join(tokens) + "\n")
    if source_settings is not None:
        (source / "tokenizer_config.json").write_text(json.dumps(source_settings))
    save_cross_encoder(student, tmp_path / "saved", source, lower_case)
    ids = [197, 199] if lower_case else [196, 198]
    assert load_vocabulary(tmp_path / "saved").lower_case is lower_case
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("Paris W", add_special_tokens=False)["input_ids"] == ids
    if source_settings is not None:
        saved_settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
        assert source_settings.items() - {("do_lower_case", not lower_case)} <= saved_settings.items()
        assert json.loads((source / "tokenizer_config.json").read_text()) == source_settings


# Forward pass


@st.composite
def models_and_batches(draw):
    heads, layers = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    config = BertConfig(vocab_size=50, hidden_size=heads * draw(st.integers(1, 6)), num_hidden_layers=layers,
                        num_attention_heads=heads, intermediate_size=draw(st.integers(1, 20)),
                        max_position_embeddings=24, hidden_act=draw(st.sampled_from(["gelu", "relu", "gelu_new"])),
                        initializer_range=0.5, num_labels=draw(st.integers(1, 3)), classifier_dropout=0.5)
    torch.manual_seed(draw(st.integers(0, 9999)))
    lengths = torch.tensor(draw(st.lists(st.integers(3, 20), min_size=1, max_size=5)))
    length = int(lengths.max()) + draw(st.integers(0, 4))
    is_token = torch.arange(length) < lengths[:, None]
    segments = is_token & (torch.arange(length) >= (torch.rand(len(lengths)) * lengths).long()[:, None])
    batch = Batch(torch.randint(1, 50, is_token.shape) * is_token, segments.long(), is_token.long(),
                  has_padding=not is_token.all())
    return config, batch


@settings(deadline=None, max_examples=40)
@given(models_and_batches(), st.sampled_from([(torch.float64, 1e-10), (torch.float32, 1e-5)]))
def test_logits_and_hidden_states_are_those_of_transformers(case, precision):
    (config, batch), (dtype, tolerance) = case, precision
    theirs = BertForSequenceClassification(config).to(dtype).eval()
    for parameter in theirs.parameters():              # including biases and layer norms, which start as 0 and 1
        torch.nn.init.normal_(parameter, std=0.3)
    ours = CrossEncoder(config).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.inference_mode():
        fast, full = ours(batch), ours(batch, list(range(1, config.num_hidden_layers + 1)))
        reference = theirs(batch.input_ids, batch.attention_mask, batch.token_type_ids, output_hidden_states=True)
    assert fast.logits.shape == (len(batch.input_ids), config.num_labels)
    assert torch.allclose(fast.logits, full.logits, rtol=tolerance, atol=tolerance)
    assert torch.allclose(fast.logits, reference.logits, rtol=tolerance, atol=tolerance)
    is_token = batch.attention_mask.bool()
    for number, expected in enumerate(reference.hidden_states):
        assert torch.allclose(full.hidden_states[number][is_token], expected[is_token], rtol=tolerance, atol=tolerance)
    assert not fast.hidden_states and not fast.queries


@settings(deadline=None, max_examples=20)
@given(models_and_batches(), st.integers(1, 4))
def test_padding_does_not_change_logits(case, extra):
    config, batch = case
    model = CrossEncoder(config).double().eval()
    padded = Batch(*(torch.nn.functional.pad(tensor, (0, min(extra, 24 - tensor.shape[1])))
                   for tensor in (batch.input_ids, batch.token_type_ids, batch.attention_mask)))
    with torch.inference_mode():
        expected = torch.cat([model(Batch(*(tensor[row:row + 1, :batch.attention_mask[row].sum()] for tensor in (
            batch.input_ids, batch.token_type_ids, batch.attention_mask)), has_padding=False)).logits
            for row in range(len(batch.input_ids))])
        assert torch.allclose(model(padded).logits, expected, rtol=0, atol=1e-10)
