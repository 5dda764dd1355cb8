"""Feature files: tokenized query-passage pairs as a stream of pickle frames.

    header   {format, version, set_name, max_seq_length, vocabulary, vocabulary_size, lower_case, token_type}
    chunk    {ids, labels, lengths, query_lengths, tokens}       any number of times, up to CHUNK_EXAMPLES examples each
    end      {end, examples, tokens, sha256}                     without it the file is cut off; the checksum is over
                                                                 the header and all chunks

`ids` is one string with a line for each example; the other fields of a chunk are the bytes of little-endian arrays:
labels int8 (-1: none), lengths and query_lengths uint16 (tokens with special tokens; the query segment holds
[CLS] query [SEP]), tokens `token_type` ids of all examples end to end, without padding. Masks and segments follow
from the lengths. Frames hold nothing but dicts, strings, numbers and bytes, so the reader refuses every other pickle
instruction before it runs one: a feature file cannot name, let alone call, any function, nor claim memory it does not
fill.
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
from simplified_tinybert.model.vocabulary import Vocabulary

if TYPE_CHECKING:
    from simplified_tinybert.model.bert import Batch

FORMAT, VERSION = "simplified-tinybert features", 1
CHUNK_EXAMPLES = 8192
HEADER_FIELDS = {"format": str, "version": int, "set_name": str, "max_seq_length": int, "vocabulary": str,
                 "vocabulary_size": int, "lower_case": bool, "token_type": str}
CHUNK_FIELDS = {"ids": str, "labels": bytes, "lengths": bytes, "query_lengths": bytes, "tokens": bytes}
END_FIELDS = {"end": bool, "examples": int, "tokens": int, "sha256": str}
INSTRUCTIONS = frozenset(
    "PROTO FRAME STOP MARK EMPTY_DICT SETITEM SETITEMS MEMOIZE BINGET LONG_BINGET NEWTRUE NEWFALSE BININT BININT1 "
    "BININT2 LONG1 SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8".split())


class _PlainUnpickler(pickle.Unpickler):
    """Admits plain containers only: every reference to a class or function is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> object:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no feature file needs; the file is refused, "
                                     f"nothing in it was run")


NO_LABEL = -1           # of an example


@dataclass
class Examples:
    """Tokenized pairs as flat arrays (in memory or memory-mapped); lengths count tokens with special tokens."""
    tokens: np.ndarray                                                       # (sum of lengths) uint16 or uint32
    lengths: np.ndarray                                                      # (N) uint16
    query_lengths: np.ndarray                                                # (N) uint16
    labels: np.ndarray                                                       # (N) int8, -1: none
    ids: list[str] | None = None                                             # (N)

    def __post_init__(self):
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: np.ndarray, width: int | None = None) -> "Batch":
        """Examples `indices` padded with zeros to `width` positions (default: the longest of them)."""
        import torch  # here, because it takes seconds, and only models have a use for it

        from simplified_tinybert.model.bert import Batch
        lengths = self.lengths[indices].astype(np.int64)
        width = width or int(lengths.max())
        positions = np.arange(width)
        keep = positions < lengths[:, None]                                  # (B, L)
        input_ids = np.zeros((len(indices), width), dtype=np.int64)
        input_ids[keep] = np.concatenate([self.tokens[self.offsets[i]:self.offsets[i + 1]] for i in indices])
        segments = keep & (positions >= self.query_lengths[indices, None])
        return Batch(torch.from_numpy(input_ids), torch.from_numpy(segments.astype(np.int64)),
                     torch.from_numpy(keep.astype(np.int64)),
                     torch.from_numpy(self.labels[indices].astype(np.int64)), has_padding=not keep.all())

    def split(self, count: int) -> tuple["Examples", "Examples"]:
        """The first `count` examples, and the rest."""
        middle = self.offsets[count]
        return tuple(Examples(self.tokens[tokens], self.lengths[rows], self.query_lengths[rows], self.labels[rows],
                              self.ids[rows])
                     for tokens, rows in ((slice(middle), slice(count)), (slice(middle, None), slice(count, None))))

    def frame(self) -> dict:
        """The chunk frame of a feature file."""
        return {"ids": "\n".join(self.ids), "labels": self.labels.tobytes(), "lengths": self.lengths.tobytes(),
                "query_lengths": self.query_lengths.tobytes(), "tokens": self.tokens.tobytes()}


def joined(parts: list[Examples]) -> Examples:
    arrays = [np.concatenate([getattr(part, name) for part in parts])
              for name in ("tokens", "lengths", "query_lengths", "labels")]
    return Examples(*arrays, [example_id for part in parts for example_id in part.ids])


class FeatureWriter:
    """Writes header, chunks and closing frame to an open binary file."""

    def __init__(self, handle: IO[bytes], set_name: str, max_seq_length: int, vocabulary: Vocabulary):
        largest = max(vocabulary.pieces.values())
        self.handle, self.examples, self.tokens, self.digest = handle, 0, 0, hashlib.sha256()
        self.token_type = "<u2" if largest < 2 ** 16 else "<u4"
        header = {"format": FORMAT, "version": VERSION, "set_name": set_name, "max_seq_length": max_seq_length,
                  "vocabulary": vocabulary.checksum(), "vocabulary_size": largest + 1,
                  "lower_case": vocabulary.lower_case, "token_type": self.token_type}
        _digest_header(self.digest, header)
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
    """Yield the chunks of a feature file in order. Raises UserError where the file is damaged, cut off or hostile."""
    with open(path, "rb") as handle:
        header = _read_header(handle, path)
        examples, tokens, digest = 0, 0, hashlib.sha256()
        _digest_header(digest, header)
        while True:
            frame = _load_frame(handle, path, f"after {examples} examples")
            if "end" in frame:
                break
            _check_fields(frame, CHUNK_FIELDS, path, f"chunk after {examples} examples")
            chunk = _unpack_chunk(frame, header, path)
            _digest_chunk(digest, frame)
            examples, tokens = examples + len(chunk), tokens + len(chunk.tokens)
            yield chunk
        _check_fields(frame, END_FIELDS, path, "closing frame")
        if (frame["examples"], frame["tokens"], frame["sha256"]) != (examples, tokens, digest.hexdigest()):
            raise UserError(f"{path}: is damaged: its closing frame counts {frame['examples']} examples and "
                            f"{frame['tokens']} tokens, found {examples} and {tokens}, or their checksum differs; "
                            f"make the file again with tokenize_to_features.py")
        if handle.read(1):
            raise UserError(f"{path}: holds data after its closing frame; feature files cannot be joined with cat, "
                            f"name them one after the other instead")


@dataclass
class FeatureSummary:
    """What a whole pass over one or several feature files tells. `checksum` identifies their content and order."""
    paths: list[Path]
    header: dict = field(default_factory=dict)
    examples: int = 0
    tokens: int = 0
    labelled: int = 0
    unpaired: int = 0                                   # ids that are not query_id#passage_id
    chunks: list[int] = field(default_factory=list)     # examples of each chunk
    checksum: str = ""


def summarise(paths: list[Path], problems: Problems) -> FeatureSummary | None:
    """Read all files once, in bounded memory; damage and headers that do not go together are added to `problems`."""
    before, headers, total = problems.count, [], FeatureSummary(paths)
    digest = hashlib.sha256()
    for path in paths:
        if not check_input_file(path, problems, "features", read_twice=True):
            continue
        try:
            headers.append((path, read_header(path)))
            _digest_header(digest, headers[-1][1])
            for chunk in read_chunks(path):
                total.chunks.append(len(chunk))
                total.examples += len(chunk)
                total.tokens += len(chunk.tokens)
                total.labelled += int((chunk.labels >= 0).sum())
                total.unpaired += sum("#" not in example_id for example_id in chunk.ids)
                _digest_chunk(digest, chunk.frame())
        except UserError as error:
            problems.add(str(error))
    for path, header in headers[1:]:
        first_path, first = headers[0]
        for name in ("max_seq_length", "vocabulary", "vocabulary_size", "lower_case", "token_type"):
            if header[name] != first[name]:
                problems.add(f"{path}: has {name} {header[name]}, but {first_path} has {first[name]}; "
                             f"tokenize both with the same settings")
    if not total.examples and problems.count == before:
        problems.add(f"{', '.join(map(str, paths))}: no examples in the feature file")
    if problems.count > before:
        return None
    total.header, total.checksum = headers[0][1], digest.hexdigest()
    return total


def ids_of(paths: list[Path], indices: np.ndarray) -> list[str]:
    """Ids of examples by their place in the files, which are read for it once more."""
    wanted, found, first = set(indices.tolist()), {}, 0
    for path in paths:
        for chunk in read_chunks(path):
            found |= {number: chunk.ids[number - first] for number in wanted if first <= number < first + len(chunk)}
            first += len(chunk)
    return [found[index] for index in indices.tolist()]


def _load_frame(handle: IO[bytes], path: Path, where: str) -> dict:
    if not handle.peek(1):
        raise UserError(f"{path}: is cut off {where}; make or copy the file again")
    start = handle.tell()
    try:
        for instruction, _, _ in pickletools.genops(handle):
            if instruction.name not in INSTRUCTIONS:
                raise pickle.UnpicklingError(f"it holds the pickle instruction {instruction.name}, which no feature "
                                             f"file needs; the file is refused, nothing in it was run")
        handle.seek(start)
        frame = _PlainUnpickler(handle).load()
    except Exception as error:          # a damaged pickle can raise almost anything; none of it is a bug of ours
        raise UserError(f"{path}: is not a feature file, or damaged or cut off {where} "
                        f"({error or type(error).__name__}); make it again with tokenize_to_features.py") from error
    if not isinstance(frame, dict):
        raise UserError(f"{path}: holds a {type(frame).__name__} {where}; expected a feature file")
    return frame


def _read_header(handle: IO[bytes], path: Path) -> dict:
    header = _load_frame(handle, path, "at its start")
    if header.get("format") != FORMAT:
        raise UserError(f"{path}: is not a feature file; make one with tokenize_to_features.py")
    _check_fields(header, {"version": int}, path, "header")
    if header["version"] != VERSION:
        raise UserError(f"{path}: has format version {header['version']}; expected {VERSION}; make it again with "
                        f"this version's tokenize_to_features.py")
    _check_fields(header, HEADER_FIELDS, path, "header")
    if header["token_type"] not in ("<u2", "<u4"):
        raise UserError(f"{path}: header: token_type is {shorten(header['token_type'])}; expected '<u2' or '<u4'")
    return header


def _check_fields(frame: dict, fields: dict[str, type], path: Path, where: str) -> None:
    for name, kind in fields.items():
        if type(frame.get(name)) is not kind:
            raise UserError(f"{path}: {where}: field {name} is {type(frame.get(name)).__name__}; "
                            f"expected {kind.__name__}; the file is damaged")


def _unpack_chunk(frame: dict, header: dict, path: Path) -> Examples:
    """Arrays of a chunk, checked against each other and against the header. Raises UserError."""
    try:
        chunk = Examples(np.frombuffer(frame["tokens"], header["token_type"]), np.frombuffer(frame["lengths"], "<u2"),
                         np.frombuffer(frame["query_lengths"], "<u2"), np.frombuffer(frame["labels"], "<i1"),
                         frame["ids"].split("\n"))
        frame["ids"].encode("utf-8")                    # fails if an id could not be written to a score file
    except ValueError as error:
        raise UserError(f"{path}: is damaged: {error}") from error
    sizes = {len(chunk.ids), len(chunk.lengths), len(chunk.query_lengths), len(chunk.labels)}
    fits = (len(sizes) == 1 and chunk.offsets[-1] == len(chunk.tokens)
            and (chunk.query_lengths > 0).all() and (chunk.query_lengths < chunk.lengths).all()
            and chunk.lengths.max() <= header["max_seq_length"] and chunk.tokens.max() < header["vocabulary_size"]
            and chunk.labels.min() >= -1 and chunk.labels.max() <= 1)
    if not fits:
        raise UserError(f"{path}: is damaged: the chunk that begins with example {shorten(chunk.ids[0])} contradicts "
                        f"itself or the header; make the file again with tokenize_to_features.py")
    return chunk


def _digest_header(digest: "hashlib._Hash", header: dict) -> None:
    digest.update(repr([header[name] for name in HEADER_FIELDS]).encode())


def _digest_chunk(digest: "hashlib._Hash", chunk: dict) -> None:
    digest.update(chunk["ids"].encode("utf-8"))
    for name in ("labels", "lengths", "query_lengths", "tokens"):
        digest.update(chunk[name])
