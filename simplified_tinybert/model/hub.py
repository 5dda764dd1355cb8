"""Where a model is: a local directory, or a Hugging Face hub id that is fetched once and kept in the hub's own cache."""
from pathlib import Path

from simplified_tinybert.common.files import UserError, reason
from simplified_tinybert.model.tokenizer_files import TOKENIZER_FILES

CONFIG_FILES = ("config.json", "bert_config.json")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                "pytorch_model.bin.index.json")         # the first that is there holds the model, as in transformers
ADAPTER_FILE = "adapter_config.json"
PROJECTION_FILE = "fit_dense.safetensors"
FETCHED = (*CONFIG_FILES, *WEIGHT_FILES, "model-*.safetensors", "pytorch_model-*.bin", PROJECTION_FILE, ADAPTER_FILE,
           *TOKENIZER_FILES)


def find_model(name: str) -> Path:
    """Directory of a model: a local one, or the downloaded snapshot of a Hugging Face hub id. Raises UserError."""
    directory = Path(name)
    if directory.is_dir():
        return directory
    if directory.is_file():
        raise UserError(f"{name}: is a file; name the directory that holds it and the model's other files: "
                        f"{directory.parent}")
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or directory.exists()
    if looks_like_path:
        raise UserError(f"{name}: no such model directory; expected a directory with one of {', '.join(CONFIG_FILES)}, "
                        f"or a hub id such as huawei-noah/TinyBERT_General_4L_312D")
    from huggingface_hub import errors, snapshot_download  # here, for it takes time, and local models do without
    try:
        return Path(snapshot_download(name, allow_patterns=list(FETCHED)))
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{name}: neither a directory here nor a public model on the hub; check the spelling") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{name}: no directory of this name here, and the hub cannot be reached ({reason(error)}); copy "
                        f"the model to a local directory and name that") from error
