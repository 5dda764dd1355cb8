"""Features of a training as memory maps: random access to any number of examples in bounded memory."""
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from simplified_tinybert.common.files import UserError, name_in_errors
from simplified_tinybert.data.features import Examples, FeatureSummary, read_chunks

ARRAYS = ("lengths", "query_lengths", "labels")


def map_examples(paths: list[Path], summary: FeatureSummary, cache_dir: Path) -> Examples:
    """All examples of feature files, as `mapped` gives them."""
    chunks = (chunk for path in paths for chunk in read_chunks(path))
    return mapped(cache_dir / f"features-{summary.checksum[:32]}", summary.header["token_type"], chunks)


def mapped(directory: Path, token_type: str, parts: Iterable[Examples]) -> Examples:
    """All parts together as memory maps in `directory`; if it is there already, they are not asked for.

    The directory is named by the content, so that jobs which share a cache never meet in one directory half-made.
    """
    if not directory.is_dir():
        aside = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")      # containers and machines share process ids
        aside.mkdir(parents=True)
        try:
            with name_in_errors(directory):
                _write_arrays(parts, aside)
            os.rename(aside, directory)
        except OSError:
            if not directory.is_dir():                     # otherwise another job was faster: its directory serves as well
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    try:
        arrays = [np.load(directory / f"{name}.npy") for name in ARRAYS]
        tokens = np.memmap(directory / "tokens.bin", dtype=token_type, mode="r", shape=(int(arrays[0].sum(dtype=int)),))
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{directory}: the cached features are damaged ({error}); remove this directory and start "
                        f"again") from error
    return Examples(tokens, *arrays)


def _write_arrays(parts: Iterable[Examples], directory: Path) -> None:
    collected = {name: [] for name in ARRAYS}
    with open(directory / "tokens.bin", "wb") as tokens:
        for part in parts:
            tokens.write(part.tokens.tobytes())
            for name in ARRAYS:
                collected[name].append(getattr(part, name))
        tokens.flush()
        os.fsync(tokens.fileno())
    for name in ARRAYS:
        with open(directory / f"{name}.npy", "wb") as handle:
            np.save(handle, np.concatenate(collected[name]))
            handle.flush()
            os.fsync(handle.fileno())
