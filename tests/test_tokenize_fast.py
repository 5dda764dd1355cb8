"""Every short cut of tokenize_to_features.py beside the plain way."""
import functools
import multiprocessing
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run_script
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import tokenize_to_features
from simplified_tinybert.common.files import UserError
from simplified_tinybert.common.text import lines_of, read_blocks, read_lines
from simplified_tinybert.common.workers import _receive, map_in_order
from simplified_tinybert.data.features import CHUNK_EXAMPLES, Examples, read_chunks
from simplified_tinybert.data.tokenization import CachedTokenizer, TextCache
from simplified_tinybert.model.tokenizer_files import load_vocabulary

LINES = st.text(alphabet="\t\t\t#ab 01\u00a0\u2028\x1c\x1f\u3000é", max_size=25)
LETTERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n"), max_size=120)
WORDS = st.lists(st.sampled_from(["the", "unaffable", "Ça", "ΟΔΟΣ", "Σ", "ΑΣ,", "a-b...", "...", "日本x", "e\u0301",
                                  "\u0301", "", "x" * 101, "İI", "\u00a0", "\u200d", "\r", "don't!", "[SEP]", "ｱ"]),
                 max_size=60).map(" ".join)


@pytest.fixture(scope="module", params=[True, False])
def vocabulary(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("vocabulary")
    (directory / "vocab.txt").write_bytes((ROOT / "tests/data/bert-base-uncased-vocab.txt").read_bytes())
    return load_vocabulary(directory, lower_case=request.param)


@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(["train", "dev", "test"]), LINES)
@example("test", "q#p\ta\tb")
@example("train", "1\ta\tb\t1")
@example("test", "q#p\ta\t\t1")
def test_the_quick_check_finds_right_lines_alone(set_name, line):
    complaints = tokenize_to_features.check_line(line, set_name)
    found = tokenize_to_features.id_of_right_line(line, set_name)
    assert found == (None if complaints else line.split("\t")[0])


@settings(max_examples=400, deadline=None)
@given(text=WORDS | LETTERS | st.tuples(WORDS, LETTERS).map("".join), length=st.integers(8, 40),
       memory=st.sampled_from([0, 2000, 2 ** 20]))
def test_remembered_words_make_the_pieces_of_the_text(vocabulary, text, length, memory):
    cutter = CachedTokenizer(vocabulary, length, by_words=True, memory=memory)
    plain = vocabulary.tokenizer().encode(text, add_special_tokens=False).ids
    for _ in range(2):                                  # computed, then remembered
        found = np.frombuffer(cutter.texts[text], cutter.token_type).tolist()
        assert found == plain[:len(found)] and len(found) >= min(len(plain), length)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=200), st.integers(0, 3000))
def test_what_is_remembered_is_right_and_bounded(keys, limit):
    remembered = TextCache(lambda text: text.encode() * 2, limit)
    for key in keys:
        assert remembered[str(key)] == str(key).encode() * 2
        assert (len(remembered) + len(remembered.elder)) * 150 <= limit + 1000


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(alphabet="ab\r\u2028é", max_size=9), min_size=1, max_size=40), st.booleans(), st.booleans())
def test_blocks_hold_the_lines_of_the_file(tmp_path_factory, lines, mark, ended):
    assume(lines != [""] or ended)                      # a byte order mark alone: the checks refuse such a file
    path = tmp_path_factory.mktemp("blocks") / "lines.txt"
    path.write_bytes(b"\xef\xbb\xbf" * mark + "\n".join(lines).encode() + b"\n" * ended)
    with open(path, "rb") as handle:
        found = [line for block in read_blocks(handle) for line in lines_of(block)]
    assert found == [text for _, text in read_lines(path, problems=None)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 3 * CHUNK_EXAMPLES), max_size=6))
def test_chunks_are_full_whatever_the_parts(sizes):
    numbers = iter(range(sum(sizes)))
    parts = [Examples(np.arange(size, dtype=np.uint16), np.ones(size, np.uint16), np.ones(size, np.uint16),
                      np.zeros(size, np.int8), [str(next(numbers)) for _ in range(size)]) for size in sizes]
    chunks = list(tokenize_to_features.in_chunks(parts))
    assert [len(chunk) for chunk in chunks[:-1]] == [CHUNK_EXAMPLES] * (len(chunks) - 1)
    assert [example_id for chunk in chunks for example_id in chunk.ids] == [str(n) for n in range(sum(sizes))]
    assert sum(int(chunk.tokens.sum()) for chunk in chunks) == sum(int(part.tokens.sum()) for part in parts)


def doubling():
    return functools.partial(int.__mul__, 2)


def dying():
    return exit


@pytest.mark.parametrize("workers", [1, 3])
def test_results_of_several_processes_come_in_order(workers):
    assert list(map_in_order(doubling, range(20), workers)) == list(range(0, 40, 2))
    assert list(map_in_order(doubling, [], workers)) == []


def test_a_lost_process_is_told_of():
    with pytest.raises(UserError, match="ended too early.*--num_workers 1 of tokenize_to_features.py"):
        list(map_in_order(dying, range(5), 2))


def test_a_process_lost_while_it_sends_is_told_of():
    here, there = multiprocessing.Pipe()
    os.write(there.fileno(), (1000).to_bytes(4, "big") + b"the begin")
    there.close()
    with pytest.raises(EOFError):
        _receive(here)


def test_processes_that_start_hear_no_signals():
    """In a process of its own, as Python changes what is blocked when it starts the first one."""
    code = ("import signal; from functools import partial\n"
            "from simplified_tinybert.common.workers import map_in_order\n"
            "blocked = map_in_order(partial(partial, signal.pthread_sigmask, signal.SIG_BLOCK), [[], []], 2)\n"
            "print([signal.SIGINT in each and signal.SIGTERM in each for each in blocked])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[True, True]"


def test_any_number_of_processes_writes_the_same_bytes(tmp_path):
    generator = random.Random(0)
    words = (ROOT / "tests/data/bert-base-uncased-vocab.txt").read_text(encoding="utf-8").split("\n")[2000:9000]
    with open(tmp_path / "pairs.tsv", "w", encoding="utf-8") as handle:
        for number in range(2 * tokenize_to_features.PAIRS_FOR_A_PROCESS + 100):
            handle.write(f"q{number}#d_{number}\t{' '.join(generator.choices(words, k=3))}\t"
                         f"{' '.join(generator.choices(words, k=generator.randint(1, 30)))}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/vocab.txt").write_bytes((ROOT / "tests/data/bert-base-uncased-vocab.txt").read_bytes())
    written = []
    for workers in (1, 3):
        output = tmp_path / f"features{workers}.pkl"
        done = run_script("tokenize_to_features.py", "--set_name", "test", "--raw_data_file", tmp_path / "pairs.tsv",
                          "--output_features_file", output, "--bert_model_dir", tmp_path / "model", "--max_seq_length",
                          24, "--num_workers", workers)
        assert done.returncode == 0, done.stderr
        written.append(output.read_bytes())
    assert written[0] == written[1]
    assert sum(len(chunk) for chunk in read_chunks(output)) == 2 * tokenize_to_features.PAIRS_FOR_A_PROCESS + 100
