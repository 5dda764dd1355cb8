"""Find a model: a local directory, or a Hugging Face hub id, which is downloaded once into the hub's cache."""
from pathlib import Path

from simplified_tinybert.common.files import UserError, reason
from simplified_tinybert.tokenization.tokenizer_files import TOKENIZER_FILES

CONFIG_FILES = ("config.json", "bert_config.json")
# The first of these files that exists is read, as in transformers
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                "pytorch_model.bin.index.json")
ADAPTER_FILE = "adapter_config.json"
PROJECTION_FILE = "fit_dense.safetensors"
DOWNLOADED = (*CONFIG_FILES, *WEIGHT_FILES[:2], "model-*.safetensors", PROJECTION_FILE, ADAPTER_FILE, *TOKENIZER_FILES)
DOWNLOADED_WITHOUT_SAFETENSORS = (*WEIGHT_FILES[2:], "pytorch_model-*.bin")


def config_file(directory: Path) -> Path | None:
    """Return the configuration of a model directory, if it has one."""
    return next((directory / name for name in CONFIG_FILES if (directory / name).is_file()), None)


def find_model(name: str) -> Path:
    """Return the directory of a model: a local one, or a snapshot downloaded from the hub. Raises UserError."""
    directory = Path(name)
    if directory.is_dir():
        return directory
    if directory.is_file():
        raise UserError(f"{name}: is a file; name the directory that holds the model: {directory.parent}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or directory.exists():
        raise UserError(f"{name}: no such model directory; expected a directory with one of {', '.join(CONFIG_FILES)}, "
                        f"or a hub id such as huawei-noah/TinyBERT_General_4L_312D")
    from huggingface_hub import errors  # slow to import, and only needed here
    try:
        return download(name)
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{name}: neither a directory nor a public model on the hub; check the spelling") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{name}: no such directory, and the hub cannot be reached ({reason(error)}); copy the model "
                        f"to a local directory and name that") from error


def download(name: str) -> Path:
    """Download a model, unless it is in the hub's cache. PyTorch's own weight files only if there are no others."""
    from huggingface_hub import snapshot_download
    directory = Path(snapshot_download(name, allow_patterns=list(DOWNLOADED)))
    if not any((directory / weights).is_file() for weights in WEIGHT_FILES[:2]):
        directory = Path(snapshot_download(name, revision=directory.name,
                                           allow_patterns=list(DOWNLOADED_WITHOUT_SAFETENSORS)))
    return directory
