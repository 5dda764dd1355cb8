"""Every optimization of tokenization against the plain computation."""
import functools
import multiprocessing
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run_script
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tokenize_to_features
from simplified_tinybert.common.files import UserError
from simplified_tinybert.common.text import lines_of, read_blocks, read_lines
from simplified_tinybert.common.workers import _receive, map_in_order
from simplified_tinybert.data.features import CHUNK_EXAMPLES, Examples, read_chunks
from simplified_tinybert.tokenization.pairs import CachedTokenizer, TextCache
from simplified_tinybert.tokenization.tokenizer_files import load_vocabulary

LETTERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n"), max_size=120)
WORDS = st.lists(st.sampled_from(["the", "unaffable", "Ça", "ΟΔΟΣ", "Σ", "ΑΣ,", "a-b...", "...", "日本x", "e\u0301",
                                  "\u0301", "", "x" * 101, "İI", "\u00a0", "\u200d", "\r", "don't!", "[SEP]", "ｱ"]),
                 max_size=60).map(" ".join)


@pytest.fixture(scope="module", params=[True, False])
def vocabulary(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("vocabulary")
    (directory / "vocab.txt").write_bytes((ROOT / "tests/data/bert-base-uncased-vocab.txt").read_bytes())
    loaded = load_vocabulary(directory, lower_case=request.param)
    library = loaded.tokenizer()
    loaded.tokenizer = lambda: library                  # building it takes most of the time of an example
    return loaded


TEXTS = {"text": WORDS | LETTERS | st.tuples(WORDS, LETTERS).map("".join), "length": st.integers(8, 40),
         "cache_bytes": st.sampled_from([0, 2000, 2 ** 20])}


@settings(max_examples=40, deadline=None)
@given(**TEXTS)
def test_cached_words_give_the_tokens_of_the_text(vocabulary, text, length, cache_bytes):
    check_cached_words(vocabulary, text, length, cache_bytes)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(**TEXTS)
def test_cached_words_give_the_tokens_of_many_texts(vocabulary, text, length, cache_bytes):
    check_cached_words(vocabulary, text, length, cache_bytes)


def check_cached_words(vocabulary, text, length, cache_bytes):
    tokenizer = CachedTokenizer(vocabulary, length, by_words=True, cache_bytes=cache_bytes)
    expected = vocabulary.tokenizer().encode(text, add_special_tokens=False).ids
    for _ in range(2):                                  # computed, then cached
        found = np.frombuffer(tokenizer.prefixes[text], tokenizer.dtype).tolist()
        assert found == expected[:len(found)] and len(found) >= min(len(expected), length)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=200), st.integers(0, 3000))
def test_the_cache_is_correct_and_bounded(keys, limit):
    cache = TextCache(lambda text: text.encode() * 2, limit)
    for key in keys:
        assert cache[str(key)] == str(key).encode() * 2
        assert (len(cache) + len(cache.old)) * 150 <= limit + 1000


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(alphabet="ab\r\u2028é", max_size=9), min_size=1, max_size=40), st.booleans(), st.booleans())
def test_blocks_contain_the_lines_of_the_file(tmp_path_factory, lines, mark, ended):
    assume(lines != [""] or ended)                      # a file of one byte order mark is rejected as empty
    path = tmp_path_factory.mktemp("blocks") / "lines.txt"
    path.write_bytes(b"\xef\xbb\xbf" * mark + "\n".join(lines).encode() + b"\n" * ended)
    with open(path, "rb") as handle:
        found = [line for block in read_blocks(handle) for line in lines_of(block)]
    assert found == [text for _, text in read_lines(path, problems=None)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 3 * CHUNK_EXAMPLES), max_size=6))
def test_chunks_are_full_for_any_block_sizes(sizes):
    numbers = iter(range(sum(sizes)))
    blocks = [Examples(np.arange(size, dtype=np.uint16), np.ones(size, np.uint16), np.ones(size, np.uint16),
                       np.zeros(size, np.int8), [str(next(numbers)) for _ in range(size)]) for size in sizes]
    chunks = list(tokenize_to_features.in_chunks(blocks))
    assert [len(chunk) for chunk in chunks[:-1]] == [CHUNK_EXAMPLES] * (len(chunks) - 1)
    assert [example_id for chunk in chunks for example_id in chunk.ids] == [str(n) for n in range(sum(sizes))]
    assert sum(int(chunk.tokens.sum()) for chunk in chunks) == sum(int(block.tokens.sum()) for block in blocks)


def doubling():
    return functools.partial(int.__mul__, 2)


def dying():
    return exit


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_results_of_worker_processes_are_in_order(workers):
    assert list(map_in_order(doubling, range(20), workers)) == list(range(0, 40, 2))
    assert list(map_in_order(doubling, [], workers)) == []


def test_a_lost_process_is_reported():
    with pytest.raises(UserError, match="process died.*--num_workers 1 of tokenize_to_features.py"):
        list(map_in_order(dying, range(5), 2))


def test_a_process_lost_while_sending_is_detected():
    receiver, sender = multiprocessing.Pipe()
    os.write(sender.fileno(), (1000).to_bytes(4, "big") + b"the start")
    sender.close()
    with pytest.raises(EOFError):
        _receive(receiver)


def test_workers_start_with_signals_blocked():
    """In a new process, because Python changes the blocked signals when it starts its first worker."""
    code = ("import signal; from functools import partial\n"
            "from simplified_tinybert.common.workers import map_in_order\n"
            "blocked = map_in_order(partial(partial, signal.pthread_sigmask, signal.SIG_BLOCK), [[], []], 2)\n"
            "print([signal.SIGINT in each and signal.SIGTERM in each for each in blocked])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[True, True]"


def test_the_number_of_processes_does_not_change_the_file(tmp_path):
    generator = random.Random(0)
    words = (ROOT / "tests/data/bert-base-uncased-vocab.txt").read_text(encoding="utf-8").split("\n")[2000:9000]
    with open(tmp_path / "pairs.tsv", "w", encoding="utf-8") as handle:
        for number in range(2 * tokenize_to_features.PAIRS_PER_PROCESS + 100):
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
    assert sum(len(chunk) for chunk in read_chunks(output)) == 2 * tokenize_to_features.PAIRS_PER_PROCESS + 100
