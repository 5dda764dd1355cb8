"""Problems, atomic writing, reading lines, duplicates, exit codes."""
import errno
import gzip
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from simplified_tinybert.common.duplicates import DuplicateFinder
from simplified_tinybert.common.files import (
    Problems,
    UserError,
    atomic_writer,
    check_input_file,
    check_output_file,
    new_directory,
    run_main,
    shorten,
)
from simplified_tinybert.common.text import read_lines

line_texts = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=12)   # NUL: test_text.py
keys = st.text(max_size=2) | st.tuples(st.text(max_size=1), st.text(max_size=1))


def read(content: bytes):
    with tempfile.TemporaryDirectory() as directory:
        path, problems = Path(directory) / "lines", Problems()
        path.write_bytes(content)
        lines = list(read_lines(path, problems))
        return lines, [message.removeprefix(str(path)) for message in problems.messages]


def test_no_problems_raise_nothing():
    Problems().raise_if_any()


def test_problems_are_raised_together_in_order():
    problems = Problems()
    problems.add("one")
    problems.add("two")
    with pytest.raises(UserError, match=r"\Aone\ntwo\Z"):
        problems.raise_if_any()


@pytest.mark.parametrize(("count", "last"), [(3, "m2"), (4, "... and 1 more problems"), (9, "... and 6 more problems")])
def test_problems_beyond_the_limit_are_counted(count, last):
    problems = Problems(limit=3)
    for number in range(count):
        problems.add(f"m{number}")
    with pytest.raises(UserError) as raised:
        problems.raise_if_any()
    lines = str(raised.value).splitlines()
    assert lines[:3] == ["m0", "m1", "m2"] and lines[-1] == last and len(lines) == min(count, 4)


@pytest.mark.parametrize(("mode", "content"), [("w", "a\nλ\n"), ("wb", b"a\n\x00\xff")])
def test_atomic_writer_replaces_the_file_at_the_end(tmp_path, mode, content):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_writer(path, mode) as handle:
        handle.write(content)
        handle.flush()
        assert path.read_text() == "old"
    assert path.read_bytes() == (content.encode() if mode == "w" else content)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError, SystemExit])
@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("mode", ["w", "wb"])
def test_atomic_writer_leaves_nothing_after_a_failure(tmp_path, mode, old, failure):
    path = tmp_path / "file"
    if old:
        path.write_bytes(old)
    with pytest.raises(failure), atomic_writer(path, mode) as handle:
        handle.write("half" if mode == "w" else b"half")
        raise failure
    assert os.listdir(tmp_path) == (["file"] if old else [])
    assert not old or path.read_bytes() == old


def test_new_directory_raises_the_errors_of_its_body_and_keeps_the_directory_of_another_job(tmp_path):
    with new_directory(tmp_path / "cache") as temporary:
        (temporary / "file").write_text("first")
    with new_directory(tmp_path / "cache") as temporary:
        (temporary / "file").write_text("second")
    with pytest.raises(OSError, match="full"), new_directory(tmp_path / "cache"):
        raise OSError("full")
    assert os.listdir(tmp_path) == ["cache"] and (tmp_path / "cache" / "file").read_text() == "first"


def test_atomic_writer_accepts_a_string_and_requires_the_directory(tmp_path):
    with atomic_writer(str(tmp_path / "file")) as handle:
        handle.write("x")
    assert (tmp_path / "file").read_text() == "x"
    with pytest.raises(FileNotFoundError), atomic_writer(tmp_path / "nowhere" / "file"):
        pass


def test_atomic_writer_sets_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    with atomic_writer(tmp_path / "file"):
        pass
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_check_output_file(tmp_path):
    problems = Problems()
    check_output_file(tmp_path / "new", problems)
    assert not problems.count
    for path, expected in [(tmp_path, "is a directory"), (tmp_path / "a" / "b", "does not exist")]:
        problems = Problems()
        check_output_file(path, problems)
        assert problems.count == 1 and str(path) in problems.messages[0] and expected in problems.messages[0]


def test_check_input_file(tmp_path):
    problems = Problems()
    (tmp_path / "file").touch()
    assert check_input_file(tmp_path / "file", problems, "pairs") and not problems.count
    assert not check_input_file(tmp_path / "absent", problems, "pairs")
    assert not check_input_file(tmp_path, problems, "pairs")
    assert "absent: cannot read the pairs" in problems.messages[0] and "directory" in problems.messages[1]


@given(st.lists(line_texts, max_size=6), st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.booleans(), st.booleans())
def test_read_lines_returns_the_written_lines(texts, end, closed, mark, packed):
    texts = [text.lstrip("\ufeff") for text in texts]
    closed = closed or (bool(texts) and not texts[-1])              # "" without a line end is not a line
    content = end.join(text.encode() for text in texts) + (end if texts and closed else b"")
    content = b"\xef\xbb\xbf" * (mark and bool(texts)) + content
    lines, problems = read(gzip.compress(content) if packed else content)
    assert lines == list(enumerate(texts, start=1)) and not problems


def test_only_line_feeds_end_lines():
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\rg\x1ch"
    assert read(f"{text}\nnext".encode())[0] == [(1, text), (2, "next")]


def test_lines_that_are_not_utf8_are_reported_and_skipped():
    lines, problems = read(b"one\nna\xefve\nthree\n\xff\xfe")
    assert lines == [(1, "one"), (3, "three")]
    assert [message.split(" ")[0] for message in problems] == [":2:", ":4:"]
    assert "byte 3 of the line (0xef)" in problems[0] and "iconv" in problems[0]


@pytest.mark.parametrize("encoded", [b"\xed\xa0\x80", b"\xc0\x80", b"\xf8\x88\x80\x80\x80"])
def test_surrogates_and_overlong_forms_are_not_utf8(encoded):
    lines, problems = read(encoded)
    assert not lines and len(problems) == 1


def test_truncated_gzip_files_are_detected():
    packed = gzip.compress(b"".join(b"line %d of the file\n" % number for number in range(200)))
    for length in range(2, len(packed)):
        lines, problems = read(packed[:length])
        assert len(problems) == 1 and re.match(r":\d+: the gzip file is damaged", problems[0]), length


def test_damaged_gzip_files_are_detected():
    content = bytes(range(100)) + b"\n"
    packed, intact = gzip.compress(content, mtime=0), read(content)
    for position in range(10, len(packed)):                         # after the header of ten bytes
        damaged = bytearray(packed)
        damaged[position] ^= 0x10
        lines, problems = read(bytes(damaged))
        assert problems or (lines, problems) == intact, position    # some bits between blocks are unused


def test_all_gzip_members_are_read():
    assert read(gzip.compress(b"a\nb") + gzip.compress(b"c\n"))[0] == [(1, "a"), (2, "bc")]


def test_gzip_with_trailing_data_is_damaged():
    lines, problems = read(gzip.compress(b"a\n") + b"tail")
    assert lines == [(1, "a")] and len(problems) == 1


@given(st.lists(keys, max_size=40))
def test_duplicates_as_a_dictionary_finds_them(values):
    finder, problems, seen, expected = DuplicateFinder(), Problems(limit=1000), {}, []
    for number, value in enumerate(values, start=1):
        finder.add(value)
        if value in seen:
            expected.append((number, seen[value]))
        seen.setdefault(value, number)
    finder.report(iter(enumerate(values, start=1)), Path("f"), "id", problems)
    found = [re.match(r"f:(\d+): id .* duplicate of line (\d+);", message, re.DOTALL).groups()
             for message in problems.messages]
    assert [(int(number), int(first)) for number, first in found] == expected


def test_keys_of_equal_hash_are_not_duplicates():
    class Key(str):
        def __hash__(self):
            return 7

    finder, problems = DuplicateFinder(), Problems()
    values = [Key("a"), Key("b"), Key("c"), Key("b")]
    for value in values:
        finder.add(value)
    assert finder.repeated_hashes() == {7}
    finder.report(iter(enumerate(values, start=1)), Path("f"), "id", problems)
    assert [message.split(" ")[0] for message in problems.messages] == ["f:4:"]


def test_keys_are_not_read_again_without_repeated_hashes():
    finder = DuplicateFinder()
    finder.add("a")

    def never_read():
        raise AssertionError
        yield

    finder.report(never_read(), Path("f"), "id", Problems())


def fail(error):
    raise error


@pytest.mark.parametrize(("error", "code", "stderr"), [
    (UserError("one\ntwo"), 2, "error: one\nerror: two\n"),
    (FileNotFoundError(errno.ENOENT, "No such file", "name"), 2, "error: name: No such file\n"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device\n"),
    (OSError("odd"), 2, "error: odd\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
])
def test_exit_codes(capsys, error, code, stderr):
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: fail(error))
    assert exit_.value.code == code
    assert capsys.readouterr() == ("", stderr)


def test_success_does_not_exit(capsys):
    run_main(lambda: None)
    assert capsys.readouterr() == ("", "")


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: fail(ZeroDivisionError()))


@given(st.text(), st.integers(8, 80))
def test_shortened_values_fit_on_one_line(text, width):
    shown = shorten(text, width)
    assert len(shown) <= width and len(shown.splitlines()) == 1
    assert len(repr(text)) > width or shown == repr(text)


def test_devices_and_pipes_are_rejected_as_output_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        problems = Problems()
        check_output_file(path, problems)
        assert "is a device or a pipe" in problems.messages[0]


def test_checking_a_pipe_neither_blocks_nor_disturbs_its_writer(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    problems = Problems()
    check = [sys.executable, "-c", "import sys; from pathlib import Path\n"
             "from simplified_tinybert.common.files import *\n"
             "problems = Problems()\nchecked = check_input_file(Path(sys.argv[1]), problems, 'run')\n"
             "print(checked, problems.messages)"]
    done = subprocess.run([*check, str(pipe)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "True []\n"
    assert not check_input_file(pipe, problems, "pairs", read_twice=True)
    assert "pipe: is not a regular file" in problems.messages[0]


def test_atomic_writer_follows_a_link(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic_writer(tmp_path / "link") as handle:
        handle.write("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"


@pytest.mark.parametrize(("write", "reason"), [
    ("handle.write(b'x' * 5000)", "File too large"),
    ("numpy.save(handle, numpy.zeros(5000))", "requested and"),
])
def test_a_full_disk_is_reported_with_the_file(tmp_path, write, reason):
    script = ("import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
              "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
              "import numpy\nfrom simplified_tinybert.common.files import atomic_writer, run_main\n"
              f"def main():\n    with atomic_writer(sys.argv[1], 'wb') as handle:\n        {write}\n"
              "run_main(main)")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "big.txt")], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and re.search(f"{tmp_path}/big.txt: .*{reason}", done.stderr)
    assert not list(tmp_path.iterdir())
