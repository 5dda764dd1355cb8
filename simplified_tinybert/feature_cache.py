"""Features of a training as memory maps: random access to any number of examples in bounded memory."""
import os
import shutil
import uuid
from pathlib import Path

import numpy as np

from simplified_tinybert.features import Examples, FeatureSummary, read_chunks
from simplified_tinybert.files import UserError

ARRAYS = ("lengths", "query_lengths", "labels")


def map_examples(paths: list[Path], summary: FeatureSummary, cache_dir: Path) -> Examples:
    """All examples of the files as memory maps in a folder of their own under `cache_dir`, built once and reused.

    The folder is named by the content, so that jobs which share `cache_dir` never meet in one folder half-made.
    """
    folder = cache_dir / f"features-{summary.fingerprint[:32]}"
    if not folder.is_dir():
        aside = cache_dir / f".{folder.name}.{uuid.uuid4().hex}"      # containers and machines share process ids
        aside.mkdir(parents=True)
        try:
            _write_arrays(paths, aside)
            os.rename(aside, folder)
        except OSError:
            if not folder.is_dir():                     # otherwise another job was faster: its folder serves as well
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    try:
        arrays = [np.load(folder / f"{name}.npy") for name in ARRAYS]
        tokens = np.memmap(folder / "tokens.bin", dtype=summary.header["token_type"], mode="r", shape=(summary.tokens,))
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{folder}: the cached features are damaged ({error}); remove this folder and start "
                        f"again") from error
    return Examples(tokens, *arrays)


def _write_arrays(paths: list[Path], folder: Path) -> None:
    collected = {name: [] for name in ARRAYS}
    with open(folder / "tokens.bin", "wb") as tokens:
        for path in paths:
            for chunk in read_chunks(path):
                tokens.write(chunk.tokens.tobytes())
                for name in ARRAYS:
                    collected[name].append(getattr(chunk, name))
        tokens.flush()
        os.fsync(tokens.fileno())
    for name in ARRAYS:
        with open(folder / f"{name}.npy", "wb") as handle:
            np.save(handle, np.concatenate(collected[name]))
            handle.flush()
            os.fsync(handle.fileno())
