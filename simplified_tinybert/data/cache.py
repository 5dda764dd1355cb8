"""Cache of training features as memory maps: random access to any number of examples in bounded memory."""
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from simplified_tinybert.common.files import UserError, atomic_writer, new_directory
from simplified_tinybert.data.features import Examples, FeatureSummary, read_chunks

ARRAYS = ("lengths", "query_lengths", "labels")


def map_examples(paths: list[Path], summary: FeatureSummary, cache_dir: Path) -> Examples:
    """Return all examples of the feature files as memory maps."""
    chunks = (chunk for path in paths for chunk in read_chunks(path))
    return map_chunks(cache_dir / f"features-{summary.checksum[:32]}", summary.header["token_type"], chunks)


def map_chunks(directory: Path, token_type: str, chunks: Iterable[Examples]) -> Examples:
    """Return the concatenated chunks as memory maps in `directory`; an existing directory is reused.

    The name of the directory must identify its content, so that jobs can share a cache.
    """
    if not directory.is_dir():
        with new_directory(directory) as temporary:
            _write_arrays(chunks, temporary)
    try:
        arrays = [np.load(directory / f"{name}.npy") for name in ARRAYS]
        tokens = np.memmap(directory / "tokens.bin", dtype=token_type, mode="r", shape=(int(arrays[0].sum(dtype=int)),))
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{directory}: the cached features are damaged ({error}); remove this directory and start "
                        f"again") from error
    return Examples(tokens, *arrays)


def _write_arrays(chunks: Iterable[Examples], directory: Path) -> None:
    collected = {name: [] for name in ARRAYS}
    with atomic_writer(directory / "tokens.bin", "wb") as handle:
        for chunk in chunks:
            handle.write(chunk.tokens.tobytes())
            for name in ARRAYS:
                collected[name].append(getattr(chunk, name))
    for name in ARRAYS:
        with atomic_writer(directory / f"{name}.npy", "wb") as handle:
            np.save(handle, np.concatenate(collected[name]))
