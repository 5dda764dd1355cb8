"""The configuration of a model directory: read, and checked for all that a BERT cross-encoder needs."""
import re
from pathlib import Path

from transformers import BertConfig

from simplified_tinybert.common.files import Problems, UserError, reason
from simplified_tinybert.model.bert import ACTIVATIONS, activation_named
from simplified_tinybert.model.hub import ADAPTER_FILE, CONFIG_FILES
from simplified_tinybert.model.weights import read_json, some

LEAST = {"vocab_size": 1, "hidden_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 1,
         "max_position_embeddings": 1, "type_vocab_size": 2}
PRECISION = ("dtype", "torch_dtype")                    # weights say theirs themselves
# Words in the names of a relevant class, and of the other one, which may be "not relevant" as well as "irrelevant"
YES = {"relevant", "rel", "positive", "pos", "yes", "y", "true", "match", "entailment", "duplicate", "related", "good"}
NO = {"not", "no", "n", "non", "irrelevant", "irrel", "negative", "neg", "false", "notrelevant", "nonrelevant",
      "mismatch", "contradiction", "unrelated", "bad"}


def find_config(directory: Path) -> Path:
    """config.json or bert_config.json of a model directory. Raises UserError."""
    path = next((directory / name for name in CONFIG_FILES if (directory / name).is_file()), None)
    if (directory / ADAPTER_FILE).is_file():
        base = read_json(directory / ADAPTER_FILE, "configuration of an adapter").get("base_model_name_or_path")
        raise UserError(f"{directory / ADAPTER_FILE}: says that this is an adapter (LoRA) of {base}; merge the two first, "
                        f"by merge_and_unload of peft, and save what that gives")
    if path is None:
        nested = sorted((other.parent for pattern in ("*/config.json", "snapshots/*/config.json")
                         for other in directory.glob(pattern)), key=_number)
        hint = f"the model is in {nested[-1]}; name that" if nested else "is it a model directory?"
        raise UserError(f"{directory}: holds neither {' nor '.join(CONFIG_FILES)}; {hint}")
    return path


def _number(directory: Path) -> tuple[int, str]:
    found = re.search(r"checkpoint-(\d+)$", directory.name)
    return int(found[1]) if found else -1, directory.name


def read_config(directory: Path) -> BertConfig:
    """BERT configuration from config.json or bert_config.json of a directory, or from such a file. Raises UserError."""
    path = directory if directory.is_file() else find_config(directory)
    content, problems = read_json(path, "BERT configuration"), Problems()
    if content.get("model_type", "bert") != "bert":
        raise UserError(f"{path}: is a model of type {content['model_type']}; expected bert, which alone is read here")
    if not {"model_type", "architectures", *LEAST} & content.keys():
        raise UserError(f"{path}: is not a valid BERT configuration: has none of its settings, such as hidden_size "
                        f"(found: {some(content) or 'nothing'}); fetch it again")
    _check_content(path, content, problems)
    problems.raise_if_any()
    try:
        config = BertConfig(**{key: value for key, value in content.items() if key not in PRECISION} | _labels(content))
    except Exception as error:        # whatever a malformed file makes the library raise, the file is to blame
        raise UserError(f"{path}: is not a valid BERT configuration: {reason(error)}") from error
    _check_config(path, config, problems)
    problems.raise_if_any()
    return config


def _check_content(path: Path, content: dict, problems: Problems) -> None:
    """Complain about what no BERT encoder of query and passage can have."""
    for name, least in LEAST.items():
        value = content.get(name, least)
        if type(value) is not int or value < least:
            why = ": query and passage are told apart by their token types" if least == 2 else ""
            problems.add(f"{path}: is not a valid BERT configuration: {name} is {value!r}; expected a whole number of "
                         f"{least} or more{why}")
    if content.get("position_embedding_type", "absolute") != "absolute":
        problems.add(f"{path}: has {content['position_embedding_type']} positions; expected absolute ones")
    for name in ("is_decoder", "add_cross_attention"):
        if content.get(name):
            problems.add(f"{path}: {name} is {content[name]!r}, as in a decoder; expected an encoder, which sees the "
                         f"whole text")
    if content.get("quantization_config"):
        problems.add(f"{path}: has a quantization_config; expected a model that is not quantized, fetch or save that")


def _check_config(path: Path, config: BertConfig, problems: Problems) -> None:
    try:
        activation_named(config.hidden_act)
    except KeyError as error:
        problems.add(f"{path}: hidden_act is {error}; expected one of {', '.join(ACTIVATIONS)}, or another one that "
                     f"transformers knows")
    if config.hidden_size % config.num_attention_heads:
        problems.add(f"{path}: hidden_size {config.hidden_size} is no multiple of num_attention_heads "
                     f"{config.num_attention_heads}; these describe no BERT model")
    if not 0 <= config.layer_norm_eps < 1:
        problems.add(f"{path}: layer_norm_eps is {config.layer_norm_eps}; expected a small number, such as 1e-12")


def _labels(content: dict) -> dict:
    """id2label from label2id, where there is that alone."""
    numbers = content.get("label2id")
    if content.get("id2label") or not isinstance(numbers, dict) or sorted(map(str, numbers.values())) != ["0", "1"]:
        return {}
    return {"id2label": {int(number): name for name, number in numbers.items()}}


def reversed_labels(config: BertConfig) -> str | None:
    """What is odd about the names of two classes: relevance is taken to be class 1. None if nothing is."""
    names = [str((config.id2label or {}).get(number, "")) for number in (0, 1)]
    numbers = [re.fullmatch(r"(?:label|class)?[\s_-]*(-?\d+)", name.strip().lower()) for name in names]
    if all(numbers):
        odd = int(numbers[0][1]) > int(numbers[1][1])
    else:
        odd = _meaning(names[0]) > _meaning(names[1])
    return f"class 0 is named {names[0]!r}, class 1 {names[1]!r}" if odd and config.num_labels == 2 else None


def _meaning(name: str) -> int:
    """1 for the name of a relevant class, -1 for that of another, 0 for what says nothing."""
    words = re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    return -1 if NO.intersection(words) else 1 if YES.intersection(words) else 0
