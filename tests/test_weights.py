"""Weights and configurations as other tools write them: which are read, and how errors are reported."""
import argparse
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, change_config, tiny_vocabulary
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from simplified_tinybert.checks.shell import check_chain
from simplified_tinybert.common.files import UserError, reason
from simplified_tinybert.model.configuration import read_config
from simplified_tinybert.model.hub import find_model
from simplified_tinybert.model.pretrained import load_cross_encoder, load_ranker
from simplified_tinybert.model.weights import canonical_names, weights_checksum

NAME = "student_2x24"
WEIGHTS = load_file(DATA / f"{NAME}.safetensors")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 437955512\n"
PAGE = b"\n<!DOCTYPE html>\n<html lang=en><head><title>Sign in</title>" + b" " * 3000


@pytest.fixture
def directory(tmp_path) -> Path:
    """Directory of a model without weights."""
    path = tmp_path / "model"
    path.mkdir()
    shutil.copyfile(DATA / f"{NAME}.config.json", path / "config.json")
    (path / "vocab.txt").write_text("\n".join(tiny_vocabulary()) + "\n")
    return path


def save(directory, weights=WEIGHTS):
    save_file({name: tensor.clone() for name, tensor in weights.items()}, directory / "model.safetensors")
    return directory


def renamed(rename):
    return {rename(name): tensor for name, tensor in WEIGHTS.items()}


def error_of(directory, lines=1, **options):
    with pytest.raises(UserError) as raised:
        load_ranker(find_model(str(directory)), **options)
    assert len(str(raised.value).splitlines()) == lines, raised.value
    return str(raised.value)


def has_golden_weights(model):
    found, expected = dict(model.named_parameters()), canonical_names(WEIGHTS)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


# Names


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "module._orig_mod.", "_orig_mod.module.",
                                    "model.bert_model.", "net.", "student.", "base_model.model.", "cross_encoder.lm."])
def test_common_prefixes_are_removed(directory, prefix):
    assert has_golden_weights(load_cross_encoder(save(directory, renamed(lambda name: prefix + name)))[0])


@pytest.mark.parametrize("inside", ["bert._orig_mod.", "bert.module.", "bert._fsdp_wrapped_module."])
def test_wrappers_inside_names_are_removed(directory, inside):
    weights = renamed(lambda name: name.replace("bert.", inside, 1))
    assert has_golden_weights(load_cross_encoder(save(directory, weights))[0])


def test_bare_encoder_in_an_attribute(directory):
    bare = {"model." + name.removeprefix("bert."): tensor for name, tensor in WEIGHTS.items() if name[:5] == "bert."}
    model, _ = load_cross_encoder(save(directory, bare), new_head=torch.Generator())
    assert torch.equal(model.bert.pooler.dense.weight, WEIGHTS["bert.pooler.dense.weight"])


@pytest.mark.parametrize("weights", [
    renamed(lambda name: "student." + name) | renamed(lambda name: "teacher." + name),
    renamed(lambda name: "model." + name if "layer" in name else name),
    renamed(lambda name: "model." + name) | {"loss.weight": torch.ones(2)},
    renamed(lambda name: name.replace("bert.", "roberta.")), renamed(lambda name: "x_" + name)])
def test_ambiguous_names_are_reported_with_the_missing_ones(directory, weights):
    lack, hold = error_of(save(directory, weights), lines=2).splitlines()
    assert "lack bert." in lack and "in all)" in lack
    assert next(name for name in sorted(weights) if name not in WEIGHTS) in hold and "in all)" in hold


def test_more_tensors_than_a_bert_has_are_named_with_a_remedy(directory):
    message = error_of(save(directory, WEIGHTS | {"loss_fct.weight": torch.ones(2)}))
    assert "hold loss_fct.weight, not expected in this model; remove them from the file" in message


def test_two_tensors_with_the_same_canonical_name_are_refused(directory):
    for other in ("module.bert.pooler.dense.bias", "pooler.dense.bias"):
        message = error_of(save(directory, WEIGHTS | {other: torch.ones(24)}))
        assert f"both bert.pooler.dense.bias and {other}" in message


@pytest.mark.parametrize("head", ["classifier.out_proj", "score"])
def test_other_heads_are_refused_even_for_a_general_student(directory, head):
    save(directory, renamed(lambda name: name.replace("classifier", head)))
    assert f"hold {head}.bias, {head}.weight" in error_of(directory, lines=2)
    assert f"hold {head}.bias, {head}.weight" in error_of(directory, new_head=torch.Generator())


def test_lora(directory):
    lora = {"bert.encoder.layer.0.attention.self.query.lora_A.weight": torch.ones(2, 24)}
    assert "LoRA" in error_of(save(directory, WEIGHTS | lora))
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "google/some-bert"}')
    assert "google/some-bert" in error_of(save(directory)) and "adapter_config.json" in error_of(directory)


# Files


def lightning_checkpoint():
    return {"epoch": 1, "global_step": 3, "state_dict": renamed(lambda name: "model." + name), "loops": {},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(1.0), "best_model_path": "a"}},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}], "hyper_parameters": {"lr": 1e-3}}


@pytest.mark.parametrize("content", [
    {"state_dict": WEIGHTS, "epoch": 3}, {"model": WEIGHTS}, {"model_state_dict": WEIGHTS}, WEIGHTS | {"epoch": 3},
    {"model": WEIGHTS, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, lightning_checkpoint()])
def test_checkpoints_of_training_tools(directory, content):
    torch.save(content, directory / "pytorch_model.bin")
    assert has_golden_weights(load_cross_encoder(directory)[0])


@pytest.mark.parametrize(("content", "found"), [
    ({"model": WEIGHTS, "ema": WEIGHTS}, "several (model, ema)"),
    ({"bert": {name[5:]: tensor for name, tensor in WEIGHTS.items() if name[:5] == "bert."},
      "classifier": {"weight": WEIGHTS["classifier.weight"], "bias": WEIGHTS["classifier.bias"]}},
     "several (bert, classifier)"),
    ({"state_dict": WEIGHTS, "classifier.bias": torch.ones(2)}, "several"), ({"epoch": 3}, "dict of epoch"),
    (WEIGHTS | {"classifier.weight": [[1.0] * 24] * 2}, "list as classifier.weight")])
def test_ambiguous_checkpoints_are_refused(directory, content, found):
    torch.save(content, directory / "pytorch_model.bin")
    assert found in error_of(directory, new_head=torch.Generator())


@pytest.mark.parametrize("content", [argparse.Namespace(a=1), np.float64(3), torch.nn.Linear(2, 2)])
def test_objects_that_are_not_tensors_are_named(directory, content):
    torch.save({"state_dict": WEIGHTS, "x": content}, directory / "pytorch_model.bin")
    message = error_of(directory)
    assert "could run code" in message and {"Namespace": "argparse.Namespace", "float64": "multiarray.scalar",
                                            "Linear": "torch.nn.modules"}[type(content).__name__] in message


@pytest.fixture
def sharded(directory) -> Path:
    names, shards = sorted(WEIGHTS), ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    for shard, held in zip(shards, (names[:9], names[9:])):
        torch.save({"module." + name: WEIGHTS[name] for name in held}, directory / shard)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(
        {"weight_map": {"module." + name: shards[number >= 9] for number, name in enumerate(names)}}))
    return directory


def test_sharded_bin_is_read(sharded):
    assert has_golden_weights(load_cross_encoder(sharded)[0])
    before = weights_checksum(sharded)
    (sharded / "pytorch_model-00002-of-00002.bin").write_bytes(POINTER)
    assert weights_checksum(sharded) != before
    assert "pytorch_model-00002-of-00002.bin: is a Git LFS pointer" in error_of(sharded)
    (sharded / "pytorch_model-00002-of-00002.bin").unlink()
    assert "pytorch_model-00002-of-00002.bin" in error_of(sharded)
    (sharded / "pytorch_model.bin.index.json").unlink()
    assert "index" in error_of(sharded).split("pytorch_model-00001-of-00002.bin")[1]


@pytest.mark.parametrize(("held", "expected"), [
    (["model.safetensors", "pytorch_model.bin", "tf_model.h5"], {"model.safetensors"}),
    (["model.safetensors.index.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"],
     {"model.safetensors.index.json", "model-00001-of-00002.safetensors"}),
    (["pytorch_model.bin", "tf_model.h5"], {"pytorch_model.bin"}),
    (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"],
     {"pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"})])
def test_weights_are_downloaded_in_one_format(tmp_path, monkeypatch, held, expected):
    """The hub is replaced by a function that selects files as the hub's library does."""
    def snapshot_download(name, revision=None, allow_patterns=()):
        assert name == "owner/model" and revision in (None, "5f1e")
        (tmp_path / "5f1e").mkdir(exist_ok=True)
        for path in filter_repo_objects([*held, "config.json", "vocab.txt"], allow_patterns=allow_patterns):
            (tmp_path / "5f1e" / path).touch()
        return str(tmp_path / "5f1e")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert {path.name for path in find_model("owner/model").iterdir()} == expected | {"config.json", "vocab.txt"}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json",
                                  "pytorch_model.bin.index.json"])
@pytest.mark.parametrize(("content", "said"), [
    (POINTER, "437,955,512 bytes"), (b"\xef\xbb\xbf" + POINTER, "Git LFS pointer"),
    (PAGE, "web page"), (b"<html>", "web page"), (b'<?xml version="1.0"?><Error/>', "web page"), (b"", "is empty")])
def test_failed_downloads_are_recognised(directory, name, content, said):
    if name == "config.json":
        save(directory)
    (directory / name).write_bytes(content)
    assert f"{directory / name}: " in error_of(directory) and said in error_of(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(("content", "said"), [
    (b'{"error": "Repository not found"}', "Repository not found"), (b"Entry not found\n", "Entry not found"),
    ('{"error": "\u00e9'.encode() * 400, "holds text"), (bytes(5000), "zeros"), (b"GGUF" + bytes(99), "GGUF"),
    (gzip.compress(bytes(99), mtime=0), "gzip"), (b"\x89HDF\r\n\x1a\n" + bytes(99), "TensorFlow")])
def test_files_that_hold_no_weights_are_recognised(directory, name, content, said):
    (directory / name).write_bytes(content)
    message = error_of(directory)
    assert f"{directory / name}: " in message and said in message and "could run code" not in message


def test_formats_are_recognised_by_their_content(directory):
    (save(directory) / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "safetensors file under another name" in error_of(directory)
    torch.save(WEIGHTS, directory / "pytorch_model.bin")
    (directory / "pytorch_model.bin").rename(directory / "model.safetensors")
    assert "is a PyTorch file" in error_of(directory)


@pytest.mark.parametrize(("name", "said"), [
    ("tf_model.h5", "from_tf"), ("flax_model.msgpack", "from_flax"), ("model.onnx", "exported"),
    ("q4.gguf", "exported"), ("model.ckpt-3.index", "convert_tf_checkpoint.py"), ("epoch=1.ckpt", "pytorch_model.bin"),
    ("model-00001-of-00002.safetensors", "index"), ("model.fp16.safetensors", "rename it to model.safetensors")])
def test_other_formats_are_named_with_a_remedy(directory, name, said):
    (directory / name).write_bytes(b"x")
    message = error_of(directory)
    assert said in message.partition(name)[2]
    (directory / name).rename(directory / "training_args.bin")
    assert "training_args.bin" not in error_of(directory)


def test_the_directory_of_the_model_is_suggested(directory):
    save(directory)
    assert str(directory) in error_of(directory / "model.safetensors").partition("model.safetensors: ")[2]
    outer = directory.parent / "outer"
    for name in ("checkpoint-9", "checkpoint-10"):
        shutil.copytree(directory, outer / name)
    assert str(outer / "checkpoint-10") in error_of(outer)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_give_one_error(directory, dtype):
    assert str(dtype) in error_of(save(directory, {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}))


# Configurations


@pytest.mark.parametrize("value", [0, -3, "4", 24.0, True, None])
@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size",
                                  "intermediate_size", "max_position_embeddings", "type_vocab_size"])
def test_invalid_sizes(directory, name, value):
    message = error_of(change_config(save(directory), **{name: value}))
    assert str(directory / "config.json") in message and f"{name} is {value!r}" in message


@pytest.mark.parametrize(("changes", "parts"), [
    ({"type_vocab_size": 1}, ["type_vocab_size is 1", "2 or more"]), ({"is_decoder": True}, ["is_decoder"]),
    ({"add_cross_attention": True}, ["add_cross_attention"]), ({"quantization_config": {"a": 1}}, ["quantiz"]),
    ({"layer_norm_eps": "1e-12"}, ["layer_norm_eps", "expected float", "'1e-12'"]),
    ({"hidden_dropout_prob": "0.1"}, ["hidden_dropout_prob", "'0.1'"]), ({"layer_norm_eps": -1.0}, ["-1.0"]),
    ({"num_labels": "2"}, ["'str'"]), ({"hidden_dropout_prob": 1.5}, ["1.5"])])
def test_invalid_configurations_are_refused_with_the_reason(directory, changes, parts):
    message = error_of(change_config(save(directory), **changes))
    assert all(part in message for part in parts) and str(directory) in message


def test_all_errors_of_a_configuration_are_reported_at_once(directory):
    message = error_of(change_config(save(directory), type_vocab_size=1, hidden_size=0, is_decoder=True), lines=3)
    assert all(name in message for name in ("type_vocab_size", "hidden_size", "is_decoder"))


@pytest.mark.parametrize(("name", "value", "held"), [
    ("vocab_size", 210, 200), ("hidden_size", 48, 24), ("num_hidden_layers", 3, 2), ("intermediate_size", 7, 48),
    ("max_position_embeddings", 512, 64), ("type_vocab_size", 3, 2)])
def test_a_size_that_differs_from_the_weights_gives_one_error_with_both_numbers(directory, name, value, held):
    message = error_of(change_config(save(directory), **{name: value}))
    assert f"{name} is {held}; " in message and f"says {value}" in message


def test_an_error_message_of_a_server_is_not_a_configuration(directory):
    (save(directory) / "config.json").write_text('{"error": "Entry not found"}')
    assert "(found: error)" in error_of(directory)


def test_a_byte_order_mark_does_not_hide_a_configuration(directory):
    text = (save(directory) / "config.json").read_text()
    (directory / "config.json").write_text(text, encoding="utf-8-sig")
    assert read_config(directory).hidden_size == 24


def test_the_reason_of_an_error_is_one_line():
    assert reason(ValueError("Validation error for field 'a':\n    TypeError: expected\nmore")) == \
        "Validation error for field 'a': TypeError: expected"
    assert reason(ValueError("first\nsecond")) == "first" and reason(KeyError()) == "KeyError"
    assert reason(ValueError("\nonly this:\n")) == "only this:" and len(reason(ValueError("x" * 999))) == 300


# Classes


@pytest.mark.parametrize(("names", "reversed_"), [
    (("LABEL_0", "LABEL_1"), False), (("not relevant", "relevant"), False), (("irrelevant", "relevant"), False),
    (("0", "1"), False), (("no", "yes"), False), (("NotRelevant", "Relevant"), False), (("1", "2"), False),
    (("relevant", "highly relevant"), False), (("cat", "dog"), False), (("contradiction", "entailment"), False),
    (("relevant", "not relevant"), True), (("relevant", "irrelevant"), True), (("Relevant", "NonRelevant"), True),
    (("yes", "no"), True), (("1", "0"), True), (("LABEL_1", "LABEL_0"), True), (("POSITIVE", "NEGATIVE"), True),
    (("True", "False"), True), (("relevant", "LABEL_1"), True), (("cat", "not_relevant"), True)])
@pytest.mark.parametrize("key", ["id2label", "label2id"])
def test_reversed_labels_give_a_warning(directory, capsys, names, reversed_, key):
    labels = {"0": names[0], "1": names[1]} if key == "id2label" else {names[0]: 0, names[1]: 1}
    config = json.loads((save(directory) / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("id2label", "label2id")} | {key: labels}
    (directory / "config.json").write_text(json.dumps(config))
    load_ranker(directory)
    output = capsys.readouterr().err
    assert ("warning: " in output and str(directory) in output and repr(names[0]) in output) == reversed_
    assert bool(output) == reversed_


def test_a_new_head_always_has_two_classes(directory, capsys):
    save(directory, {name: tensor for name, tensor in WEIGHTS.items() if not name.startswith("classifier")})
    for labels in ({"0": "relevant", "1": "not relevant"}, {"0": "a"}, {"0": "a", "1": "b", "2": "c"}):
        model, _ = load_ranker(change_config(directory, id2label=labels), new_head=torch.Generator())
        assert model.classifier.out_features == model.config.num_labels == 2
    assert not capsys.readouterr().err


def test_more_than_two_classes_are_refused(directory):
    three = {"classifier.weight": torch.ones(3, 24), "classifier.bias": torch.ones(3)}
    assert "has 3 classes" in error_of(save(directory, WEIGHTS | three))


# collection.sh


@pytest.mark.parametrize(("fine_tuned", "refused"), [(True, "not fine-tuned"), (False, None)])
def test_the_pipeline_check_loads_the_weights(directory, golden_models, fine_tuned, refused):
    save(directory, {name: tensor for name, tensor in WEIGHTS.items() if not name.startswith("classifier")})
    student = str(golden_models[NAME])
    for new_layers in (0, 1):
        if refused:
            with pytest.raises(UserError, match=refused):
                check_chain(str(directory), student, new_layers, ["standard"], fine_tuned)
        else:
            check_chain(str(directory), student, new_layers, ["standard"], fine_tuned)


def test_the_pipeline_check_refuses_an_unreadable_student(directory, golden_models):
    (directory / "pytorch_model.bin").write_bytes(POINTER)
    for new_layers in (0, 1):
        with pytest.raises(UserError, match="Git LFS"):
            check_chain(str(golden_models["teacher"]), str(directory), new_layers, ["finetune"], True)
