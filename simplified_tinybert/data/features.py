"""Feature files: tokenized query-passage pairs as a stream of pickle frames.

    header   {format, version, set_name, max_seq_length, vocabulary, vocabulary_size, lower_case, token_type}
    chunk    {ids, labels, lengths, query_lengths, tokens}       repeated; up to CHUNK_EXAMPLES examples each
    end      {end, examples, tokens, sha256}                     the checksum covers the header and all chunks

`ids` is one string with one line per example. The other fields of a chunk are the bytes of little-endian arrays:
labels int8 (-1: none); lengths and query_lengths uint16, special tokens included (the query segment is
[CLS] query [SEP]); tokens in `token_type`, the ids of all examples concatenated without padding. Attention masks and
segment ids follow from the lengths. Frames hold only dicts, strings, numbers and bytes. The reader rejects every other
pickle instruction before it executes any. So reading a feature file never runs code from it, and never reserves more
memory than its data fills.
"""
import hashlib
import pickle
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from simplified_tinybert.common.files import Problems, UserError, check_input_file, shorten
from simplified_tinybert.tokenization.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch

    from simplified_tinybert.model.batch import Batch

FORMAT, VERSION = "simplified-tinybert features", 1
CHUNK_EXAMPLES = 8192
HEADER_FIELDS = {"format": str, "version": int, "set_name": str, "max_seq_length": int, "vocabulary": str,
                 "vocabulary_size": int, "lower_case": bool, "token_type": str}
ARRAYS = ("labels", "lengths", "query_lengths", "tokens")
CHUNK_FIELDS = {"ids": str, **dict.fromkeys(ARRAYS, bytes)}
END_FIELDS = {"end": bool, "examples": int, "tokens": int, "sha256": str}
NO_LABEL = -1
INSTRUCTIONS = frozenset(      # of pickles without classes and functions
    "PROTO FRAME STOP MARK EMPTY_DICT SETITEM SETITEMS MEMOIZE BINGET LONG_BINGET NEWTRUE NEWFALSE BININT BININT1 "
    "BININT2 LONG1 SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8".split())


def token_dtype(vocabulary: Vocabulary) -> str:
    """Return the array type of token ids: uint16 if all of them fit, otherwise uint32."""
    return "<u2" if max(vocabulary.token_ids.values()) < 2 ** 16 else "<u4"


@dataclass
class Examples:
    """Tokenized pairs as flat arrays, in memory or memory-mapped. Lengths include special tokens."""
    tokens: np.ndarray                                                       # (sum of lengths) uint16 or uint32
    lengths: np.ndarray                                                      # (N) uint16
    query_lengths: np.ndarray                                                # (N) uint16
    labels: np.ndarray                                                       # (N) int8, -1: none
    ids: list[str] | None = None                                             # (N)

    def __post_init__(self):
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: np.ndarray, pad_to: int | None = None, device: "torch.device | None" = None) -> "Batch":
        """Return the examples at `indices` on `device` (default: CPU), padded to `pad_to` (default: longest) tokens."""
        import torch  # slow to import, and only models need it

        from simplified_tinybert.model.batch import Batch
        arrays = self._arrays(indices)
        return Batch.of_tokens(arrays, pad_to or int(arrays[1].max()), device or torch.device("cpu"))

    def packed_batch(self, indices: np.ndarray, device: "torch.device") -> "Batch":
        """Return the examples at `indices` on `device`, without padding, one after the other."""
        from simplified_tinybert.model.batch import Batch
        return Batch.packed(self._arrays(indices), device)

    def _arrays(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the tokens of examples, one after the other; lengths, lengths of the first segment, and labels."""
        tokens = np.concatenate([self.tokens[self.offsets[i]:self.offsets[i + 1]] for i in indices])
        rows = (self.lengths[indices], self.query_lengths[indices], self.labels[indices])
        return (tokens.astype(np.int32), *(values.astype(np.int64) for values in rows))

    def take(self, indices: np.ndarray) -> "Examples":
        """Return the examples at `indices`. They must have ids."""
        tokens = [self.tokens[start:end] for start, end in zip(self.offsets[indices], self.offsets[indices + 1])]
        return Examples(np.concatenate([self.tokens[:0], *tokens]), self.lengths[indices], self.query_lengths[indices],
                        self.labels[indices], [self.ids[index] for index in indices])

    def span(self, start: int, end: int) -> "Examples":
        """Return consecutive examples without copying their tokens. They must have ids."""
        rows, tokens = slice(start, end), slice(self.offsets[start], self.offsets[end])
        return Examples(self.tokens[tokens], self.lengths[rows], self.query_lengths[rows], self.labels[rows],
                        self.ids[rows])

    def frame(self) -> dict:
        return {"ids": "\n".join(self.ids), **{name: getattr(self, name).tobytes() for name in ARRAYS}}


def joined(parts: list[Examples]) -> Examples:
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS}
    return Examples(**arrays, ids=[example_id for part in parts for example_id in part.ids])


class FeatureWriter:
    """Writes a feature file: the header first, a chunk in each `write`, and the closing frame in `close`."""

    def __init__(self, handle: IO[bytes], set_name: str, max_seq_length: int, vocabulary: Vocabulary):
        self.handle, self.examples, self.tokens = handle, 0, 0
        header = {"format": FORMAT, "version": VERSION, "set_name": set_name, "max_seq_length": max_seq_length,
                  "vocabulary": vocabulary.checksum(), "vocabulary_size": max(vocabulary.token_ids.values()) + 1,
                  "lower_case": vocabulary.lower_case, "token_type": token_dtype(vocabulary)}
        self.digest = hashlib.sha256(_header_bytes(header))
        self._dump(header)

    def write(self, examples: Examples) -> None:
        frame = examples.frame()
        self.examples += len(examples)
        self.tokens += len(examples.tokens)
        _digest_chunk(self.digest, frame)
        self._dump(frame)

    def close(self) -> None:
        self._dump({"end": True, "examples": self.examples, "tokens": self.tokens, "sha256": self.digest.hexdigest()})

    def _dump(self, frame: dict) -> None:
        pickle.dump(frame, self.handle, protocol=5)


def read_header(path: Path) -> dict:
    with open(path, "rb") as handle:
        return _read_header(handle, path)


def read_chunks(path: Path) -> Iterator[Examples]:
    """Yield the chunks of a feature file in order. Raises UserError if the file is damaged, cut off or malicious."""
    with open(path, "rb") as handle:
        header = _read_header(handle, path)
        examples, tokens, digest = 0, 0, hashlib.sha256(_header_bytes(header))
        while "end" not in (frame := _load_frame(handle, path, f"after {examples} examples")):
            _check_fields(frame, CHUNK_FIELDS, path, f"chunk after {examples} examples")
            chunk = _unpack_chunk(frame, header, path)
            _digest_chunk(digest, frame)
            examples, tokens = examples + len(chunk), tokens + len(chunk.tokens)
            yield chunk
        _check_fields(frame, END_FIELDS, path, "closing frame")
        if (frame["examples"], frame["tokens"], frame["sha256"]) != (examples, tokens, digest.hexdigest()):
            raise UserError(f"{path}: is damaged: its closing frame counts {frame['examples']} examples and "
                            f"{frame['tokens']} tokens, found {examples} and {tokens}, or their checksum differs; "
                            f"run tokenize_to_features.py again")
        if handle.read(1):
            raise UserError(f"{path}: has data after its closing frame; feature files cannot be joined with cat, "
                            f"list them on the command line instead")


@dataclass
class FeatureSummary:
    """Statistics of one or more feature files. `checksum` identifies their content and order."""
    paths: list[Path]
    header: dict = field(default_factory=dict)
    examples: int = 0
    tokens: int = 0
    labelled: int = 0
    unpaired: int = 0                                   # ids that are not query_id#passage_id
    chunks: list[int] = field(default_factory=list)     # examples in each chunk
    checksum: str = ""


def summarise(paths: list[Path], problems: Problems) -> FeatureSummary | None:
    """Read all files once, in bounded memory. Damage and incompatible headers are added to `problems`."""
    before, headers, total, digest = problems.count, [], FeatureSummary(paths), hashlib.sha256()
    for path in paths:
        if not check_input_file(path, problems, "features", read_twice=True):
            continue
        with problems.collect():
            header = read_header(path)
            headers.append((path, header))
            digest.update(_header_bytes(header))
            for chunk in read_chunks(path):
                total.chunks.append(len(chunk))
                total.examples += len(chunk)
                total.tokens += len(chunk.tokens)
                total.labelled += int((chunk.labels >= 0).sum())
                total.unpaired += sum("#" not in example_id for example_id in chunk.ids)
                _digest_chunk(digest, chunk.frame())
    for path, header in headers[1:]:
        first_path, first = headers[0]
        for name in ("max_seq_length", "vocabulary", "vocabulary_size", "lower_case", "token_type"):
            if header[name] != first[name]:
                problems.add(f"{path}: has {name} {header[name]}, but {first_path} has {first[name]}; tokenize both "
                             f"with the same settings")
    if not total.examples and problems.count == before:
        problems.add(f"{', '.join(map(str, paths))}: no examples in the feature file")
    if problems.count > before:
        return None
    total.header, total.checksum = headers[0][1], digest.hexdigest()
    return total


def ids_of(paths: list[Path], indices: np.ndarray) -> list[str]:
    """Read the files again and return the ids of the examples at `indices`."""
    indices, found, start = indices.tolist(), {}, 0
    for path in paths:
        for chunk in read_chunks(path):
            found |= {index: chunk.ids[index - start] for index in indices if start <= index < start + len(chunk)}
            start += len(chunk)
    return [found[index] for index in indices]


class _PlainUnpickler(pickle.Unpickler):
    """A second barrier: rejects classes and functions even if INSTRUCTIONS let one through."""

    def find_class(self, module: str, name: str) -> object:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _load_frame(handle: IO[bytes], path: Path, where: str) -> dict:
    """Read the next pickle frame of a feature file; nothing is executed. Raises UserError if it is not a plain dict."""
    if not handle.peek(1):
        raise UserError(f"{path}: is cut off {where}; create or copy the file again")
    start = handle.tell()
    try:
        for instruction, _, _ in pickletools.genops(handle):
            if instruction.name not in INSTRUCTIONS:
                raise pickle.UnpicklingError(f"pickle instruction {instruction.name} is not allowed; nothing in the "
                                             f"file was executed")
        handle.seek(start)
        frame = _PlainUnpickler(handle).load()
    except Exception as error:          # a damaged pickle can raise almost any exception
        raise UserError(f"{path}: is not a feature file, or damaged or cut off {where} "
                        f"({error or type(error).__name__}); run tokenize_to_features.py again") from error
    if not isinstance(frame, dict):
        raise UserError(f"{path}: has a {type(frame).__name__} {where}; expected a feature file")
    return frame


def _read_header(handle: IO[bytes], path: Path) -> dict:
    header = _load_frame(handle, path, "at its start")
    if header.get("format") != FORMAT:
        raise UserError(f"{path}: is not a feature file; create one with tokenize_to_features.py")
    _check_fields(header, {"version": int}, path, "header")
    if header["version"] != VERSION:
        raise UserError(f"{path}: has format version {header['version']}; expected {VERSION}; run "
                        f"tokenize_to_features.py again")
    _check_fields(header, HEADER_FIELDS, path, "header")
    if header["token_type"] not in ("<u2", "<u4"):
        raise UserError(f"{path}: header: token_type is {shorten(header['token_type'])}; expected '<u2' or '<u4'")
    return header


def _check_fields(frame: dict, fields: dict[str, type], path: Path, where: str) -> None:
    for name, kind in fields.items():
        if type(frame.get(name)) is not kind:
            raise UserError(f"{path}: {where}: field {name} is {type(frame.get(name)).__name__}; "
                            f"expected {kind.__name__}; run tokenize_to_features.py again")


def _unpack_chunk(frame: dict, header: dict, path: Path) -> Examples:
    """Return the examples of a chunk. Raises UserError if it contradicts itself or the header."""
    types = {"labels": "<i1", "lengths": "<u2", "query_lengths": "<u2", "tokens": header["token_type"]}
    try:
        chunk = Examples(**{name: np.frombuffer(frame[name], types[name]) for name in ARRAYS},
                         ids=frame["ids"].split("\n"))
        frame["ids"].encode("utf-8")                    # raises for surrogates, which cannot be written to score files
    except ValueError as error:
        raise UserError(f"{path}: is damaged: {error}") from error
    sizes = {len(chunk.ids), len(chunk.lengths), len(chunk.query_lengths), len(chunk.labels)}
    fits = (len(sizes) == 1 and chunk.offsets[-1] == len(chunk.tokens)
            and (chunk.query_lengths > 0).all() and (chunk.query_lengths < chunk.lengths).all()
            and chunk.lengths.max() <= header["max_seq_length"] and chunk.tokens.max() < header["vocabulary_size"]
            and chunk.labels.min() >= NO_LABEL and chunk.labels.max() <= 1)
    if not fits:
        raise UserError(f"{path}: is damaged: the chunk that starts with example {shorten(chunk.ids[0])} contradicts "
                        f"itself or the header; run tokenize_to_features.py again")
    return chunk


def _header_bytes(header: dict) -> bytes:
    return repr([header[name] for name in HEADER_FIELDS]).encode()


def _digest_chunk(digest: "hashlib._Hash", chunk: dict) -> None:
    digest.update(chunk["ids"].encode("utf-8"))
    for name in ARRAYS:
        digest.update(chunk[name])
