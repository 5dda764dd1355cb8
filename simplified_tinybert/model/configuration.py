"""Read the configuration of a model directory, and check that it describes a BERT cross-encoder."""
import re
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import BertConfig

from simplified_tinybert.common.files import Problems, UserError, reason
from simplified_tinybert.common.text import read_json
from simplified_tinybert.model.bert import ACTIVATIONS, activation_function
from simplified_tinybert.model.hub import ADAPTER_FILE, CONFIG_FILES, config_file, find_model
from simplified_tinybert.model.weights import abbreviate

MINIMUM_SIZES = {"vocab_size": 1, "hidden_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1,
                 "intermediate_size": 1, "max_position_embeddings": 1, "type_vocab_size": 2}
# Words in the names of the relevant class and of the other class, which may be "irrelevant" or "not relevant"
POSITIVE = {"relevant", "rel", "positive", "pos", "yes", "y", "true", "match", "entailment", "duplicate", "related",
            "good"}
NEGATIVE = {"not", "no", "n", "non", "irrelevant", "irrel", "negative", "neg", "false", "notrelevant", "nonrelevant",
            "mismatch", "contradiction", "unrelated", "bad"}


class FoundModel(NamedTuple):
    directory: Path
    config: BertConfig


Models = dict[str, FoundModel]                          # by role


def find_models(names: dict[str, str | None], problems: Problems) -> Models:
    """Find the model of each role by its name: a directory or a hub id."""
    found = {}
    for role, name in names.items():
        if name:
            with problems.collect():
                directory = find_model(name)
                found[role] = FoundModel(directory, read_config(directory))
    return found


def find_config(directory: Path) -> Path:
    """Return config.json or bert_config.json of a model directory. Raises UserError."""
    adapter = directory / ADAPTER_FILE
    if adapter.is_file():
        base = read_json(adapter, "configuration of an adapter").get("base_model_name_or_path")
        raise UserError(f"{adapter}: is a LoRA adapter of {base}; merge the two with peft (merge_and_unload) and save "
                        f"the result")
    path = config_file(directory)
    if path is None:
        nested = sorted((other.parent for pattern in ("*/config.json", "snapshots/*/config.json")
                         for other in directory.glob(pattern)), key=_checkpoint_order)
        hint = f"the model is in {nested[-1]}; name that directory" if nested else "is it a model directory?"
        raise UserError(f"{directory}: holds neither {' nor '.join(CONFIG_FILES)}; {hint}")
    return path


def _checkpoint_order(directory: Path) -> tuple[int, str]:
    step = re.search(r"checkpoint-(\d+)$", directory.name)
    return int(step[1]) if step else -1, directory.name


def read_config(directory: Path) -> BertConfig:
    """Read the configuration of a model directory, or a configuration file. Raises UserError."""
    path = directory if directory.is_file() else find_config(directory)
    content, problems = read_json(path, "BERT configuration"), Problems()
    if content.get("model_type", "bert") != "bert":
        raise UserError(f"{path}: is a model of type {content['model_type']}; expected bert, the only supported type")
    if not {"model_type", "architectures", *MINIMUM_SIZES} & content.keys():
        raise UserError(f"{path}: is not a valid BERT configuration: lacks its settings, such as hidden_size "
                        f"(found: {abbreviate(content) or 'nothing'}); fetch it again")
    _check_content(path, content, problems)
    problems.raise_if_any()
    settings = {name: value for name, value in content.items() if name not in ("dtype", "torch_dtype")}
    try:
        config = BertConfig(**settings | _labels(content))
    except Exception as error:                          # the library raises almost any error for a malformed file
        raise UserError(f"{path}: is not a valid BERT configuration: {reason(error)}") from error
    _check_config(path, config, problems)
    problems.raise_if_any()
    return config


def _check_content(path: Path, content: dict, problems: Problems) -> None:
    for name, minimum in MINIMUM_SIZES.items():
        value = content.get(name, minimum)
        if type(value) is not int or value < minimum:
            why = " (token types distinguish query and passage)" if name == "type_vocab_size" else ""
            problems.add(f"{path}: is not a valid BERT configuration: {name} is {value!r}; expected a whole number of "
                         f"{minimum} or more{why}")
    if content.get("position_embedding_type", "absolute") != "absolute":
        problems.add(f"{path}: position_embedding_type is {content['position_embedding_type']}; expected absolute")
    for name in ("is_decoder", "add_cross_attention"):
        if content.get(name):
            problems.add(f"{path}: {name} is {content[name]!r}, as in a decoder; expected an encoder, which attends to "
                         f"the whole text")
    if content.get("quantization_config"):
        problems.add(f"{path}: has a quantization_config; expected a model without quantization")


def _check_config(path: Path, config: BertConfig, problems: Problems) -> None:
    known = f"expected one of {', '.join(ACTIVATIONS)}, or another name that transformers knows"
    try:
        function = activation_function(config.hidden_act)
        if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
            problems.add(f"{path}: hidden_act is {config.hidden_act!r}, which has trained parameters; {known}, without "
                         f"parameters")
    except KeyError as error:
        problems.add(f"{path}: hidden_act is {error}; {known}")
    if config.hidden_size % config.num_attention_heads:
        problems.add(f"{path}: hidden_size is {config.hidden_size}; expected a multiple of num_attention_heads, "
                     f"{config.num_attention_heads}")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        if not 0 <= (getattr(config, name) or 0.0) <= 1:
            problems.add(f"{path}: {name} is {getattr(config, name)}; expected a probability")
    if not config.initializer_range >= 0:
        problems.add(f"{path}: initializer_range is {config.initializer_range}; expected 0 or more")
    if not -config.vocab_size <= (config.pad_token_id or 0) < config.vocab_size:
        problems.add(f"{path}: pad_token_id is {config.pad_token_id}; expected the id of a token, below "
                     f"{config.vocab_size}, or null")
    if not 0 <= config.layer_norm_eps < 1:
        problems.add(f"{path}: layer_norm_eps is {config.layer_norm_eps}; expected a small number, such as 1e-12")


def _labels(content: dict) -> dict:
    """Derive id2label from label2id if only the latter is given."""
    ids = content.get("label2id")
    if content.get("id2label") or not isinstance(ids, dict) or sorted(map(str, ids.values())) != ["0", "1"]:
        return {}
    return {"id2label": {int(number): name for name, number in ids.items()}}


def reversed_labels(config: BertConfig) -> str | None:
    """Describe the names of two classes if they suggest that class 0 is the relevant one; else None."""
    names = [str((config.id2label or {}).get(number, "")) for number in (0, 1)]
    numbers = [re.fullmatch(r"(?:label|class)?[\s_-]*(-?\d+)", name.strip().lower()) for name in names]
    first, second = [int(number[1]) for number in numbers] if all(numbers) else map(_polarity, names)
    return f"class 0 is named {names[0]!r}, class 1 {names[1]!r}" if first > second and config.num_labels == 2 else None


def _polarity(name: str) -> int:
    """Return 1 for the name of a relevant class, -1 for that of a non-relevant one, and 0 for other names."""
    words = re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    return -1 if NEGATIVE.intersection(words) else 1 if POSITIVE.intersection(words) else 0
