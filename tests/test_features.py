"""Feature files: round trips, damage, malicious pickles; caches; batches."""
import base64
import hashlib
import os
import pickle
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_rows, vocabulary, write_features
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simplified_tinybert.common.files import Problems, UserError
from simplified_tinybert.data import features
from simplified_tinybert.data.cache import map_examples
from simplified_tinybert.data.features import FORMAT, VERSION, Examples, read_chunks, read_header, summarise

example_ids = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=8)
repeated = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def rows(draw, **sizes):
    tokens = draw(st.lists(st.lists(st.integers(0, 199), min_size=2, max_size=32), **sizes))
    return [(draw(example_ids), row, draw(st.integers(1, len(row) - 1)), draw(st.sampled_from([-1, 0, 1])))
            for row in tokens]


def decode(path):
    """Return the rows of a feature file in the format of write_features."""
    return [(chunk.ids[i], chunk.tokens[chunk.offsets[i]:chunk.offsets[i + 1]].tolist(), int(chunk.query_lengths[i]),
             int(chunk.labels[i])) for chunk in read_chunks(path) for i in range(len(chunk))]


def plain(table):
    return [(name, np.asarray(tokens).tolist(), query_length, label) for name, tokens, query_length, label in table]


def error_of(path):
    with pytest.raises(UserError) as raised:
        list(read_chunks(path))
    assert str(path) in str(raised.value)
    return str(raised.value)


def frames(path):
    found = []
    with open(path, "rb") as handle:
        while handle.peek(1):
            found.append(pickle.load(handle))
    return found


def rewrite(path, changed, digest=True):
    """Write frames; with `digest`, adjust the checksum so that it does not reveal the change."""
    if digest:
        total = hashlib.sha256()
        total.update(features._header_bytes(changed[0]))
        for chunk in changed[1:-1]:
            features._digest_chunk(total, chunk)
        changed[-1] = changed[-1] | {"sha256": total.hexdigest()}
    path.write_bytes(b"".join(pickle.dumps(frame, protocol=5) for frame in changed))
    return path


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A small file of two chunks."""
    path = tmp_path_factory.mktemp("features") / "sample.pkl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "CHUNK_EXAMPLES", 2)
        return write_features(path, random_rows(3, max_seq_length=12), max_seq_length=12)


# Round trip


@repeated
@given(rows(min_size=1, max_size=9), st.integers(1, 4))
def test_round_trip(tmp_path, monkeypatch, table, chunk):
    monkeypatch.setattr(features, "CHUNK_EXAMPLES", chunk)
    path = write_features(tmp_path / "f", table, set_name="dev")
    assert decode(path) == plain(table)
    assert [len(part) for part in read_chunks(path)] == [len(table[i:i + chunk]) for i in range(0, len(table), chunk)]
    header = read_header(path)
    assert {name: header[name] for name in ("set_name", "max_seq_length", "lower_case", "vocabulary_size")} == {
        "set_name": "dev", "max_seq_length": 32, "lower_case": True, "vocabulary_size": 200}
    assert header["vocabulary"] == vocabulary().checksum() and header["token_type"] == "<u2"


def test_large_vocabularies_use_32_bit_tokens(tmp_path):
    wide = vocabulary()
    wide.token_ids["last"] = 70_000
    path = tmp_path / "f"
    with open(path, "wb") as handle:
        writer = features.FeatureWriter(handle, "train", 32, wide)
        writer.write(Examples(np.array([2, 70_000, 3, 65_536, 3], np.uint32), np.array([5], np.uint16),
                              np.array([3], np.uint16), np.array([1], np.int8), ["a"]))
        writer.close()
    assert decode(path) == [("a", [2, 70_000, 3, 65_536, 3], 3, 1)]


def test_files_contain_plain_values_only(sample):
    for frame in frames(sample):
        assert {type(value) for value in frame.values()} <= {str, int, bool, bytes}


def test_a_file_without_examples_is_readable_but_reported(tmp_path):
    path, problems = write_features(tmp_path / "f", []), Problems()
    assert decode(path) == []
    assert summarise([path], problems) is None and "no examples" in problems.messages[0]


# Damage


def test_truncation_at_every_byte_is_detected(tmp_path, sample):
    content, path = sample.read_bytes(), tmp_path / "cut"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert "cut off" in error_of(path), length


def test_a_changed_byte_never_changes_the_content_unnoticed(tmp_path, sample):
    content, path = sample.read_bytes(), tmp_path / "damaged"
    header, rows_, unnoticed = read_header(sample), decode(sample), 0
    for position in range(len(content)):
        for change in (0x01, 0x80, 0xff):
            damaged = bytearray(content)
            damaged[position] ^= change
            path.write_bytes(damaged)
            try:
                found = decode(path)
            except UserError:
                continue
            unnoticed += 1
            assert (read_header(path), found) == (header, rows_), position
    assert unnoticed < len(content) / 3                # unused bytes, for example the version of a frame


@pytest.mark.parametrize("content", [
    b"", b"\n", b"q#p\tquery\tpassage\n", b"\x80", b"\x80\x05", b"\x80\x05.", b".", b"\x00" * 50, b"\xff" * 50,
    b"PK\x03\x04" + bytes(60), b"\x1f\x8b\x08\x00" + bytes(60), b"\x93NUMPY\x01\x00", b"(", b"}(",
    pickle.dumps([1, 2]), pickle.dumps("text"), pickle.dumps(None), pickle.dumps({}), pickle.dumps({"format": "other"}),
    pickle.dumps({"format": {"a": 1}}), pickle.dumps({FORMAT: 1}), pickle.dumps({1: 2, None: b""}),
    pickle.dumps({"format": FORMAT}), pickle.dumps({"format": FORMAT, "version": VERSION}),
])
def test_other_files_are_rejected(tmp_path, content):
    path, problems = tmp_path / "other", Problems()
    path.write_bytes(content)
    error_of(path)
    with pytest.raises(UserError):
        read_header(path)
    assert summarise([path], problems) is None and problems.count == 1


@pytest.mark.parametrize(("changes", "expected"), [
    ({"version": 2}, "format version 2; expected 1"), ({"version": "1"}, "version is str"), ({"version": True}, "bool"),
    ({"version": None}, "instruction NONE"), ({"version": {"a": {}}}, "version is dict"),
    ({"format": "simplified-tinybert features "}, "not a feature file"),
    ({"max_seq_length": 32.0}, "instruction BINFLOAT"), ({"max_seq_length": True}, "max_seq_length is bool"),
    ({"set_name": 1}, "set_name is int"), ({"vocabulary_size": "200"}, "vocabulary_size is str"),
    ({"lower_case": 1}, "lower_case is int"), ({"vocabulary": b"x"}, "vocabulary is bytes"),
    ({"token_type": "<u8"}, "token_type"), ({"token_type": "O"}, "token_type"),
    ({"token_type": "x" * 9999}, "token_type"), ({"token_type": "<u4"}, "damaged"),
    ({"max_seq_length": 4}, "contradicts"), ({"max_seq_length": -1}, "contradicts"),
    ({"vocabulary_size": 6}, "contradicts"),
])
def test_headers_that_contradict_the_format_or_the_chunks(tmp_path, sample, changes, expected):
    header, *rest = frames(sample)
    message = error_of(rewrite(tmp_path / "f", [header | changes, *rest]))
    assert expected in message and len(message) < 600


@pytest.mark.parametrize("name", ["set_name", "max_seq_length", "vocabulary", "vocabulary_size", "lower_case",
                                  "token_type"])
def test_header_fields_are_required(tmp_path, sample, name):
    header, *rest = frames(sample)
    del header[name]
    path = tmp_path / "f"
    path.write_bytes(b"".join(map(pickle.dumps, [header, *rest])))
    assert name in error_of(path)


@pytest.mark.parametrize("changes", [{"max_seq_length": 13}, {"vocabulary": "0" * 64}, {"lower_case": False},
                                     {"set_name": "test"}, {"vocabulary_size": 201}])
def test_the_checksum_covers_the_header(tmp_path, sample, changes):
    header, *rest = frames(sample)
    assert "checksum" in error_of(rewrite(tmp_path / "f", [header | changes, *rest], digest=False))


def short(values):
    return np.array(values, "<u2").tobytes()


@pytest.mark.parametrize("changes", [
    {"ids": "one"}, {"ids": "a\nb\nc"}, {"ids": ""}, {"ids": "a\n\ud800"}, {"ids": b"a\nb"}, {"ids": None},
    {"labels": b""}, {"labels": b"\x00"}, {"labels": b"\x00\x02"}, {"labels": b"\x00\xfe"}, {"labels": "ab"},
    {"lengths": b""}, {"lengths": b"\x05"}, {"lengths": short([5])}, {"lengths": short([6, 6])},
    {"lengths": short([0, 10])}, {"lengths": short([65535, 65535])},
    {"query_lengths": short([0, 3])}, {"query_lengths": short([5, 3])}, {"query_lengths": short([3, 3, 3])},
    {"query_lengths": bytearray(short([3, 3]))},
    {"tokens": b""}, {"tokens": bytes(19)}, {"tokens": bytes(18)}, {"tokens": bytes(22)}, {"tokens": short([200] * 10)},
    {"ids": "", "labels": b"", "lengths": b"", "query_lengths": b"", "tokens": b""},
    {"ids": "a", "labels": b"\x00", "lengths": short([0]), "query_lengths": short([0]), "tokens": b""},
])
def test_chunks_that_contradict_themselves(tmp_path, sample, changes):
    header, _, _, end = frames(sample)
    good = {"ids": "a\nb", "labels": b"\x00\xff", "lengths": short([5, 5]), "query_lengths": short([3, 3]),
            "tokens": short([9] * 10)}
    end |= {"examples": 2, "tokens": 10}
    assert len(decode(rewrite(tmp_path / "good", [header, good, end]))) == 2
    chunk = good | changes
    path = tmp_path / "f"
    path.write_bytes(b"".join(pickle.dumps(frame, protocol=5) for frame in (header, chunk, end)))
    message = error_of(path)
    assert "checksum" not in message and len(message) < 600        # detected before the closing frame


@pytest.mark.parametrize("order", ["HAE", "HBE", "HBAE", "HAABE", "HABBE", "HE", "AE", "HHABE", "HABH", "HAB", "HABEE",
                                   "HABEHABE", "HAEB", "HABEx"])
def test_missing_repeated_and_misplaced_frames(tmp_path, sample, order):
    parts = dict(zip("HABE", (pickle.dumps(frame, protocol=5) for frame in frames(sample)))) | {"x": b"\n"}
    path = tmp_path / "f"
    path.write_bytes(b"".join(parts[name] for name in order))
    error_of(path)


def test_concatenated_files_are_rejected_with_a_hint(tmp_path, sample):
    path = tmp_path / "joined"
    path.write_bytes(sample.read_bytes() * 2)
    assert "cannot be joined with cat" in error_of(path)


@pytest.mark.parametrize("changes", [{"examples": 2}, {"tokens": 0}, {"sha256": ""}, {"sha256": None},
                                     {"examples": "3"}, {"end": 1}])
def test_closing_frames_that_contradict_the_chunks(tmp_path, sample, changes):
    *rest, end = frames(sample)
    error_of(rewrite(tmp_path / "f", [*rest, end | changes], digest=False))


# Malicious pickles. Each creates the file CREATED if any of it is executed.

CREATED = "run"


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def text(value):
    """Return the pickle instruction that pushes a string."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def touch():
    return f"open({CREATED!r}, 'w')"


OPEN = b"cbuiltins\nopen\n"
ARGUMENTS = b"(" + text(CREATED) + text("w") + b"t"


def by_extension():
    return b"\x80\x02\x82\xf0" + ARGUMENTS + b"R."


MALICIOUS = {
    "os.system": pickle.dumps(Calls(os.system, f"touch {CREATED}")),
    "os.system, protocol 0": pickle.dumps(Calls(os.system, f"touch {CREATED}"), protocol=0),
    "in a dict": pickle.dumps({"format": FORMAT, "version": Calls(os.system, f"touch {CREATED}")}),
    "as a key": b"\x80\x02}" + OPEN + ARGUMENTS + b"RK\x01s.",
    "eval": pickle.dumps(Calls(eval, touch())),
    "exec": pickle.dumps(Calls(exec, touch())),
    "__import__": pickle.dumps(Calls(__import__, "antigravity")),
    "getattr chain": pickle.dumps(Calls(getattr(os, "system"), f"touch {CREATED}"), protocol=4),     # noqa: B009
    "getattr of a module": b"\x80\x04cbuiltins\ngetattr\ncos\n__dict__\n" + text("get") + b"\x86R.",
    "dotted name": b"\x80\x04" + text("os") + text("path.os.system") + b"\x93(" + text(f"touch {CREATED}") + b"tR.",
    "subprocess": pickle.dumps(Calls(subprocess.run, ["touch", CREATED])),
    "Popen": pickle.dumps(Calls(subprocess.Popen, ["touch", CREATED])),
    "torch tensor": pickle.dumps(torch.ones(2)),
    "torch load": pickle.dumps(Calls(torch.load, CREATED)),
    "numpy array": pickle.dumps(np.ones(2)),
    "numpy array, protocol 2": pickle.dumps(np.ones(2), protocol=2),
    "numpy object array": pickle.dumps(np.array([Calls(os.system, f"touch {CREATED}")], dtype=object)),
    "old numpy": (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85q\x02"
                  b"c_codecs\nencode\nX\x01\x00\x00\x00bX\x06\x00\x00\x00latin1\x86R\x87R."),
    "GLOBAL": b"\x80\x02" + OPEN + ARGUMENTS + b"R.",
    "GLOBAL alone": OPEN + b".",
    "STACK_GLOBAL": b"\x80\x04" + text("builtins") + text("open") + b"\x93" + ARGUMENTS + b"R.",
    "INST": b"(" + text(CREATED) + text("w") + b"ibuiltins\nopen\n.",
    "OBJ": b"(" + OPEN + text(CREATED) + text("w") + b"o.",
    "NEWOBJ": b"\x80\x02cio\nFileIO\n" + ARGUMENTS + b"\x81.",
    "NEWOBJ_EX": b"\x80\x04cio\nFileIO\n" + ARGUMENTS + b"}\x92.",
    "BUILD": b"\x80\x02}}" + text("__class__") + OPEN + b"sb.",
    "EXT1": by_extension(),
    "PERSID": b"Pname\n.",
    "BINPERSID": text("name") + b"Q.",
    "object": pickle.dumps(Path("x")),
    "ordered dict": pickle.dumps(OrderedDict(format=FORMAT)),
    "range": pickle.dumps(range(9)),
    "list": b"]K\x01a.",
    "set": pickle.dumps({1, 2}),
    "POP": b"N0}.",
    "base64": pickle.dumps(Calls(eval, f"exec({base64.b64encode(touch().encode())!r})")),
}
PLACES = ("start", "chunk", "inside a chunk", "end", "after the end")


def insert_pickle(sample, malicious, place):
    """Return the sample with a malicious pickle at this place."""
    header, first, second, end = (pickle.dumps(frame, protocol=5) for frame in frames(sample))
    value = malicious.removesuffix(b".").removeprefix(b"\x80\x04")
    chunk = b"\x80\x04}(" + text("ids") + value + text("labels") + b"C\x00u."
    return {"start": malicious + header + first + second + end, "chunk": header + first + malicious + second + end,
            "inside a chunk": header + first + chunk + second + end, "end": header + first + second + malicious,
            "after the end": header + first + second + end + malicious}[place]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_pickles_are_rejected_before_execution(tmp_path, monkeypatch, sample, name, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "antigravity", None)          # importing it would open a browser
    path, problems = tmp_path / "malicious", Problems()
    path.write_bytes(insert_pickle(sample, MALICIOUS[name], place))
    message = error_of(path)
    assert summarise([path], problems) is None
    assert os.listdir(tmp_path) == ["malicious"]
    assert "instruction" in message or place == "after the end", message


def test_the_malicious_pickles_work_in_plain_pickle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "eval", "exec", "GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "dotted name"):
        (tmp_path / CREATED).unlink(missing_ok=True)
        try:
            pickle.loads(MALICIOUS[name])
        except pickle.UnpicklingError:
            pass
        assert (tmp_path / CREATED).exists(), name


def test_registered_extensions_are_rejected(tmp_path, monkeypatch, sample):
    import copyreg
    monkeypatch.chdir(tmp_path)
    copyreg.add_extension("builtins", "open", 0xf0)
    try:
        pickle.loads(by_extension())                   # fills the unpickler's cache of extensions
        (tmp_path / CREATED).unlink()
        path = tmp_path / "malicious"
        path.write_bytes(insert_pickle(sample, by_extension(), "chunk"))
        error_of(path)
        assert os.listdir(tmp_path) == ["malicious"]
    finally:
        copyreg.remove_extension("builtins", "open", 0xf0)


OVERSIZED = {
    "memo index": b"}r\xff\xff\xff\xff.", "lesser memo index": b"}r\xff\xff\xff\x03.",
    "memo index, text": b"}p4294967295\n.",
    "bytes": b"\x8e" + struct.pack("<Q", 2 ** 40) + b"abc", "most bytes": b"\x8e" + struct.pack("<Q", 2 ** 63 - 1),
    "more bytes than possible": b"\x8e" + b"\xff" * 8, "bytes 32": b"B\xff\xff\xff\xff",
    "text": b"\x8d" + struct.pack("<Q", 2 ** 40) + b"abc", "text 32": b"X\xff\xff\xff\xff",
    "bytearray": b"\x96" + struct.pack("<Q", 2 ** 40), "frame": b"\x80\x04\x95" + struct.pack("<Q", 2 ** 40) + b"}.",
    "long": b"\x8b\xff\xff\xff\x7f", "negative long": b"\x8b\xff\xff\xff\xff", "digits": b"L" + b"9" * 50_000 + b"L\n.",
    "marks": b"(" * 200_000, "nested lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "nested tuples": b")" + b"\x85" * 100_000 + b".",
    "nested dicts": b"}" + (text("version") + b"}") * 100_000 + b"s" * 100_000 + b".",
    "nested version": b"}" + text("format") + text(FORMAT) + b"s" + text("version") + b"}" * 1 +
                      (text("a") + b"}") * 100_000 + b"s" * 100_000 + b"s.",
    "doubling": b"}" + b"2\x86" * 60 + b".",
}

WITH_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from simplified_tinybert.data.features import read_chunks
from simplified_tinybert.common.files import UserError
resource.setrlimit(resource.RLIMIT_AS, (2 ** 33, 2 ** 33))
for name in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        list(read_chunks(Path(name)))
    except UserError as error:
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        print(name, "rejected" if grown < 200 and len(str(error)) < 1000 else f"took {grown} MiB: {error}"[:200])
"""


def test_oversized_pickles_are_rejected_without_allocation(tmp_path):
    names = [f"{number}" for number, _ in enumerate(OVERSIZED)]
    for name, content in zip(names, OVERSIZED.values()):
        (tmp_path / name).write_bytes(content)
    done = subprocess.run([sys.executable, "-c", WITH_LITTLE_MEMORY, *names], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{name} rejected" for name in names]


# Several files


def test_summary_of_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK_EXAMPLES", 4)
    table = random_rows(11)
    table[2] = ("no hash", *table[2][1:3], -1)
    paths = [write_features(tmp_path / "a", table[:7]), write_features(tmp_path / "b", table[7:])]
    summary = summarise(paths, Problems())
    assert (summary.examples, summary.chunks, summary.labelled, summary.unpaired) == (11, [4, 3, 4], 10, 1)
    assert summary.tokens == sum(len(row[1]) for row in table)
    assert summary.header == read_header(paths[0])
    assert summarise(paths, Problems()).checksum == summary.checksum
    others = [paths[::-1], paths[:1], [paths[0], paths[0]], [write_features(tmp_path / "c", table)]]
    assert len({summarise(other, Problems()).checksum for other in others} | {summary.checksum}) == 5


@pytest.mark.parametrize("row", [("q9#D", [2, 9, 3, 9, 3], 3, 1), ("q0#D", [2, 8, 3, 9, 3], 3, 1),
                                 ("q0#D", [2, 9, 3, 9, 3], 2, 1), ("q0#D", [2, 9, 3, 9, 3], 3, 0)])
def test_checksum_distinguishes_contents(tmp_path, row):
    paths = [write_features(tmp_path / "a", [("q0#D", [2, 9, 3, 9, 3], 3, 1)]), write_features(tmp_path / "b", [row])]
    assert len({summarise([path], Problems()).checksum for path in paths}) == 2


def test_errors_of_several_files_are_reported_together(tmp_path, sample):
    header, *rest = frames(sample)
    bad = tmp_path / "bad"
    bad.write_bytes(sample.read_bytes()[:-5])
    other = rewrite(tmp_path / "other", [header | {"vocabulary": "0" * 64, "max_seq_length": 99}, *rest])
    cased = rewrite(tmp_path / "cased", [header | {"lower_case": False}, *rest])
    problems = Problems()
    assert summarise([tmp_path / "absent", bad, sample, other, sample, cased], problems) is None
    expected = [("absent", "No such file"), ("bad", "cut off"), ("other", "has max_seq_length 99, but"),
                ("other", "has vocabulary 000"), ("cased", "has lower_case False, but")]
    assert len(problems.messages) == len(expected)
    for (name, reason), message in zip(expected, problems.messages):
        assert message.startswith(str(tmp_path / name)) and reason in message


def test_headers_are_compared_with_the_first_readable_file(tmp_path, sample):
    header, *rest = frames(sample)
    other, problems = rewrite(tmp_path / "other", [header | {"max_seq_length": 99}, *rest]), Problems()
    assert summarise([tmp_path / "absent", sample, other], problems) is None
    assert len(problems.messages) == 2
    assert problems.messages[1].startswith(f"{other}: has max_seq_length 99, but {sample} has 12")


# Batches


@repeated
@given(rows(min_size=1, max_size=8), st.data())
def test_batches_as_in_a_naive_construction(table, data):
    examples = Examples(np.concatenate([row[1] for row in table]).astype(np.uint16),
                        np.array([len(row[1]) for row in table], np.uint16),
                        np.array([row[2] for row in table], np.uint16), np.array([row[3] for row in table], np.int8))
    indices = data.draw(st.lists(st.integers(0, len(table) - 1), min_size=1, max_size=10))
    longest = max(len(table[i][1]) for i in indices)
    pad_to = data.draw(st.none() | st.integers(longest, 40))
    batch, width = examples.batch(np.array(indices), pad_to), pad_to or longest
    rows_ = [table[i] for i in indices]
    assert batch.input_ids.tolist() == [tokens + [0] * (width - len(tokens)) for _, tokens, _, _ in rows_]
    assert batch.attention_mask.tolist() == [[1] * len(row[1]) + [0] * (width - len(row[1])) for row in rows_]
    assert batch.token_type_ids.tolist() == [
        [0] * query + [1] * (len(tokens) - query) + [0] * (width - len(tokens)) for _, tokens, query, _ in rows_]
    assert batch.labels.tolist() == [row[3] for row in rows_]
    assert batch.has_padding == any(len(row[1]) < width for row in rows_)
    assert {tensor.dtype for tensor in (batch.input_ids, batch.token_type_ids, batch.attention_mask, batch.labels)} == {
        torch.int64}


def test_offsets_do_not_overflow():
    examples = Examples(np.zeros(0, np.uint16), np.full(70_000, 65_535, np.uint16), np.zeros(0), np.zeros(0))
    assert examples.offsets[-1] == 70_000 * 65_535


# Memory maps


def contents(examples):
    return [examples.tokens.tolist(), examples.lengths.tolist(), examples.query_lengths.tolist(),
            examples.labels.tolist()]


def map_files(paths, cache):
    return map_examples(paths, summarise(paths, Problems()), cache)


@pytest.fixture
def two_files(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK_EXAMPLES", 3)
    return [write_features(tmp_path / "a", random_rows(7)), write_features(tmp_path / "b", random_rows(4, seed=1))]


def test_the_cache_equals_the_files(tmp_path, two_files):
    chunks = [chunk for path in two_files for chunk in read_chunks(path)]
    direct = [np.concatenate([getattr(chunk, name) for chunk in chunks]).tolist()
              for name in ("tokens", "lengths", "query_lengths", "labels")]
    examples = map_files(two_files, tmp_path / "new" / "cache")
    assert contents(examples) == direct and isinstance(examples.tokens, np.memmap) and len(examples) == 11


def test_the_cache_is_reused_and_other_files_stay(tmp_path, two_files):
    cache = tmp_path / "cache"
    (cache / "features-of-mine").mkdir(parents=True)
    (cache / "features-of-mine" / "thesis").write_text("years of work")
    (cache / ".features-hidden").write_text("also mine")
    first = contents(map_files(two_files, cache))
    state = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    assert len(state) == 6
    assert contents(map_files(two_files, cache)) == first
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == state
    map_files(two_files[:1], cache)
    assert state.items() <= {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}.items()
    assert len(list(cache.iterdir())) == 4


def test_leftovers_of_a_killed_job_are_ignored(tmp_path, two_files):
    cache = tmp_path / "cache"
    name = f"features-{summarise(two_files, Problems()).checksum[:32]}"
    (cache / f".{name}.{os.getpid()}").mkdir(parents=True)          # process ids repeat across containers
    assert len(map_files(two_files, cache)) == 11


def test_a_failure_leaves_nothing_in_the_cache(tmp_path, two_files):
    summary, cache = summarise(two_files, Problems()), tmp_path / "cache"
    two_files[1].write_bytes(two_files[1].read_bytes()[:-3])
    with pytest.raises(UserError):
        map_examples(two_files, summary, cache)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("name", ["tokens.bin", "lengths.npy", "query_lengths.npy", "labels.npy"])
@pytest.mark.parametrize("size", [None, 0, 5])
def test_a_damaged_cache_is_reported(tmp_path, two_files, name, size):
    cache = tmp_path / "cache"
    map_files(two_files, cache)
    directory, = cache.iterdir()
    if size is None:
        (directory / name).unlink()
    else:
        os.truncate(directory / name, size)
    with pytest.raises(UserError, match="remove this directory") as raised:
        map_files(two_files, cache)
    assert str(directory) in str(raised.value)


BUILD = """
import sys
from pathlib import Path
from simplified_tinybert.data.cache import map_examples
from simplified_tinybert.data.features import summarise
from simplified_tinybert.common.files import Problems
paths = [Path(sys.argv[2])]
summary = summarise(paths, Problems())
print("ready", flush=True)
sys.stdin.readline()
print(map_examples(paths, summary, Path(sys.argv[1])).tokens.sum(dtype=int))
"""


def test_concurrent_processes_share_a_cache(tmp_path):
    path = write_features(tmp_path / "f", random_rows(20_000))
    total = sum(int(chunk.tokens.sum(dtype=int)) for chunk in read_chunks(path))
    command = [sys.executable, "-c", BUILD, str(tmp_path / "cache"), str(path)]
    builders = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}) for _ in range(2)]
    assert [builder.stdout.readline() for builder in builders] == ["ready\n"] * 2
    for builder in builders:
        builder.stdin.write("go\n")
        builder.stdin.flush()
    outputs = [builder.communicate(timeout=600) for builder in builders]
    assert [int(out) for out, _ in outputs] == [total, total], outputs
    assert len(list((tmp_path / "cache").iterdir())) == 1
