"""tokenize_to_features.py: the original's tokens, casing, truncation, and invalid inputs."""
import gzip
import json
import os
import re
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, run_script, tiny_vocabulary
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

import tokenize_to_features
from simplified_tinybert.common.files import UserError, run_main
from simplified_tinybert.data.features import read_chunks, read_header
from simplified_tinybert.tokenization.pairs import CachedTokenizer, tokenize, truncated_lengths
from simplified_tinybert.tokenization.tokenizer_files import load_vocabulary
from simplified_tinybert.tokenization.vocabulary import bert_vocabulary

CASES = json.loads((DATA / "tokenization.json").read_text(encoding="utf-8"))
SPECIAL = re.compile(r"\[(CLS|SEP|MASK|PAD|UNK)\]")
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "a", "##a", "b", "##b", "c", "##c",
          "é", "e", "##e", "[", "]", "##k", "猫", ".", "#", "cls", "sep", "unk", "mask", "pad", "0", "1",
          "##1", "ss", "i"]
repeated = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def uncased(tmp_path_factory) -> Path:
    """A model directory with BERT-Base's vocabulary."""
    directory = tmp_path_factory.mktemp("uncased")
    (directory / "vocab.txt").write_bytes((DATA / "bert-base-uncased-vocab.txt").read_bytes())
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model directory with a small vocabulary of words and subwords."""
    return with_tokens(tmp_path_factory.mktemp("model"), TOKENS)


def with_tokens(directory, tokens, **settings_):
    (directory / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    if settings_:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings_))
    return directory


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, model):
    """Run the script on this content; return exit code and stderr. The output file is tmp_path / out / features."""
    (tmp_path / "out").mkdir()

    def call(content, set_name="test", *extra, name="pairs.tsv", **options):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        flags = {"set_name": set_name, "raw_data_file": path, "bert_model_dir": model, "max_seq_length": 16,
                 "output_features_file": tmp_path / "out" / "features"} | options
        monkeypatch.setattr(sys, "argv", ["tokenize", *(f"--{flag}={value}" for flag, value in flags.items()), *extra])
        capsys.readouterr()
        try:
            run_main(tokenize_to_features.main)
        except SystemExit as exit_:
            return exit_.code, capsys.readouterr().err
        return 0, capsys.readouterr().err
    return call


def features(tmp_path):
    """Return (id, token ids, length of the query segment, label) of every example written by the script."""
    return [(chunk.ids[i], chunk.tokens[chunk.offsets[i]:chunk.offsets[i + 1]].tolist(), int(chunk.query_lengths[i]),
             int(chunk.labels[i])) for chunk in read_chunks(tmp_path / "out" / "features") for i in range(len(chunk))]


def errors(stderr):
    return [line.removeprefix("error: ") for line in stderr.splitlines() if line.startswith("error: ")]


def naive_pair(tokenizer, query, passage, max_seq_length, cls=2, sep=3):
    """Return token ids and length of the query segment by the original's algorithm."""
    query, passage = (tokenizer.encode(text, add_special_tokens=False).ids for text in (query, passage))
    while len(query) + len(passage) > max_seq_length - 3:
        (query if len(query) > len(passage) else passage).pop()
    return [cls, *query, sep, *passage, sep], len(query) + 2


# The original's tokens


@pytest.mark.parametrize("number", range(len(CASES)))
def test_tokens_of_the_original(uncased, number):
    case, vocabulary = CASES[number], load_vocabulary(uncased)
    line = f"q#p\t{case['query']}\t{case['passage']}\t1"
    examples = tokenize([line], CachedTokenizer(vocabulary, case["max_seq_length"]))
    tokens, query_length = examples.tokens.tolist(), int(examples.query_lengths[0])
    if not SPECIAL.search(line):
        assert tokens == case["input_ids"]
        assert [0] * query_length + [1] * (len(tokens) - query_length) == case["token_type_ids"]
        return
    assert Counter(tokens)[101] == 1 and Counter(tokens)[102] == 2 and not {0, 100, 103} & set(tokens)
    assert tokens[0] == 101 and tokens[query_length - 1] == tokens[-1] == 102
    if case["max_seq_length"] == 256:                  # not truncated: all characters of the texts remain
        names = {number: token for token, number in vocabulary.token_ids.items()}
        kept = "".join(names[number].removeprefix("##") for number in tokens[1:-1] if number != 102)
        assert kept == re.sub(r"\s", "", case["query"] + case["passage"]).lower()


def test_the_golden_cases_are_complete():
    assert len(CASES) == 72 and sum(bool(SPECIAL.search(case["query"] + case["passage"])) for case in CASES) == 4


def test_tokens_of_the_original_through_the_script(run, tmp_path, uncased):
    for length, cases in groupby(CASES, key=lambda case: case["max_seq_length"]):
        cases = list(cases)
        lines = "".join(f"q{number}#p\t{case['query']}\t{case['passage']}\n" for number, case in enumerate(cases))
        assert run(lines, max_seq_length=length, bert_model_dir=uncased)[0] == 0
        for case, (_, tokens, _, label) in zip(cases, features(tmp_path), strict=True):
            assert label == -1
            assert tokens == case["input_ids"] or SPECIAL.search(case["query"] + case["passage"])


@given(st.text(st.sampled_from("[]CLSEPMADUNK clsepmadunk##\u200b"), max_size=30))
@example("[SEP]")
@example("[CLS][SEP] [MASK]\u200b[PAD]")
def test_no_text_produces_a_special_token(text):
    for lower_case in (True, False):
        tokens = TOKENS + ["CLS", "SEP", "##]", "##SEP", "##sep"]
        vocabulary = bert_vocabulary({token: number for number, token in enumerate(tokens)}, lower_case)
        examples = tokenize([f"q#p\t{text}\t{text}"], CachedTokenizer(vocabulary, 200))
        counts = Counter(examples.tokens.tolist())
        assert (counts[0], counts[2], counts[3], counts[4]) == (0, 1, 2, 0)


# Truncation


@given(st.lists(st.tuples(st.integers(0, 80), st.integers(0, 80)), min_size=1, max_size=20), st.integers(3, 90))
def test_truncation_removes_one_token_at_a_time(lengths, max_seq_length):
    expected = []
    for query, passage in lengths:
        while query + passage > max_seq_length - 3:
            if query > passage:
                query -= 1
            else:
                passage -= 1
        expected.append((query, passage))
    kept = truncated_lengths(*(np.array(side) for side in zip(*lengths)), max_seq_length)
    assert list(zip(*(side.tolist() for side in kept))) == expected


# Casing


def test_casing_of_a_vocabulary_without_settings(tmp_path, uncased):
    assert load_vocabulary(uncased).lower_case
    assert load_vocabulary(with_tokens(tmp_path, [*TOKENS, "Cat"])).lower_case          # like BertTokenizer


def test_capitals_in_an_uncased_vocabulary_give_a_warning(tmp_path, uncased, capsys):
    load_vocabulary(uncased), load_vocabulary(with_tokens(tmp_path, [*TOKENS, "Cat"]), lower_case=False)
    assert not capsys.readouterr().err
    load_vocabulary(tmp_path)
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"warning: {tmp_path}: ") and "--no-do_lower_case" in stderr


def test_capitals_of_special_tokens_do_not_make_a_vocabulary_cased(tmp_path):
    assert load_vocabulary(with_tokens(tmp_path, [*TOKENS, "[unused1]", "[Q]"])).lower_case


@pytest.mark.parametrize("setting", [True, False])
@pytest.mark.parametrize("extra", [[], ["Cat"]])
def test_casing_of_tokenizer_config(tmp_path, setting, extra):
    directory = with_tokens(tmp_path, TOKENS + extra, do_lower_case=setting)
    assert load_vocabulary(directory).lower_case is setting
    assert load_vocabulary(directory, not setting).lower_case is not setting


def test_settings_without_casing(tmp_path):
    assert load_vocabulary(with_tokens(tmp_path, TOKENS, model_max_length=512)).lower_case
    with pytest.raises(UserError, match=f"{tmp_path}: .*do_lower_case is null"):
        load_vocabulary(with_tokens(tmp_path, [*TOKENS, "Cat"], do_lower_case=None))


@pytest.mark.parametrize(("settings_", "tokens"), [
    ({}, [6, 16, 21]), ({"strip_accents": False}, [6, 15, 21]), ({"tokenize_chinese_chars": False}, [6, 1])])
def test_other_settings_of_tokenizer_config(tmp_path, settings_, tokens):
    vocabulary = load_vocabulary(with_tokens(tmp_path, TOKENS, **settings_))
    assert vocabulary.tokenizer().encode("Cat é猫" if len(tokens) == 3 else "cat e猫").ids == tokens


@pytest.mark.parametrize("lower_case", [True, False])
def test_casing_of_tokenizer_json(tmp_path, lower_case):
    token_ids = {token: number for number, token in enumerate([*TOKENS, "Cat"])}
    bert_vocabulary(token_ids, lower_case).tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert load_vocabulary(tmp_path) == bert_vocabulary(token_ids, lower_case)
    with_tokens(tmp_path, token_ids)
    assert load_vocabulary(tmp_path) == bert_vocabulary(token_ids, lower_case)    # vocab.txt does not specify casing
    with_tokens(tmp_path, token_ids, do_lower_case=not lower_case, tokenizer_class="BertTokenizer")
    assert load_vocabulary(tmp_path) == bert_vocabulary(token_ids, not lower_case)


@pytest.mark.parametrize("lower_case", [True, False])
def test_a_directory_saved_by_transformers(tmp_path, uncased, lower_case):
    original = BertTokenizerFast.from_pretrained(uncased, do_lower_case=lower_case)
    original.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.txt").exists()
    vocabulary = load_vocabulary(tmp_path)
    assert vocabulary.lower_case is lower_case
    assert vocabulary.checksum() == load_vocabulary(uncased).checksum()
    for case in CASES[:18]:
        if not SPECIAL.search(case["query"] + case["passage"]):
            ours = [vocabulary.tokenizer().encode(case[name]).ids for name in ("query", "passage")]
            theirs = original([case["query"], case["passage"]], add_special_tokens=False)["input_ids"]
            assert ours == theirs


def test_casing_flag_and_header(run, tmp_path):
    text = "q#p\tThe Cat\tTHE cat\n"
    assert run(text)[0] == 0
    assert read_header(tmp_path / "out" / "features")["lower_case"] is True
    assert features(tmp_path)[0][1] == [2, 5, 6, 3, 5, 6, 3]
    code, stderr = run(text, "test", "--no-do_lower_case")
    assert code == 0 and ", cased" in stderr
    assert read_header(tmp_path / "out" / "features")["lower_case"] is False
    assert features(tmp_path)[0][1] == [2, 1, 1, 3, 1, 6, 3]


# Invalid vocabularies


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("vocab.txt", b"[CLS]\na\n", "lacks [UNK], [SEP]"), ("vocab.txt", b"", "is empty"),
    ("vocab.txt", b"\xff", "not UTF-8"),
    ("tokenizer.json", b"{", "valid JSON"), ("tokenizer.json", b"[]", "holds a list"),
    ("tokenizer.json", b"{}", "not a tokenizer file"), ("tokenizer.json", b'{"model": "x"}', "not a tokenizer file"),
    ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}}}', "holds a BPE tokenizer"),
    ("tokenizer.json", b'{"model": {"type": "Unigram", "vocab": [["a", 1]]}}', "holds a Unigram tokenizer"),
    ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [{}]}', "not a tokenizer file"),
    ("tokenizer.json", b'{"model": {"vocab": {"a": -1}}}', "not whole numbers"),
    ("tokenizer.json", b'{"model": {"vocab": {"a": "1"}}}', "not whole numbers"),
    ("tokenizer_config.json", b"{}", "holds no vocabulary"), ("tokenizer_config.json", b"nonsense", "valid JSON"),
])
def test_unusable_vocabularies(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(expected)) as raised:
        load_vocabulary(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_vocabulary_with_windows_line_ends(tmp_path, model):
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(TOKENS).encode() + b"\r\n")
    assert load_vocabulary(tmp_path) == load_vocabulary(model)


def test_checksum_distinguishes_vocabularies():
    one = bert_vocabulary({"a": 0, "b": 1}, True)
    assert one.checksum() == bert_vocabulary({"b": 1, "a": 0}, False).checksum()
    others = [bert_vocabulary(token_ids, True) for token_ids in (
        {"a": 1, "b": 0}, {"a": 0}, {"a": 0, "b": 2}, {"a\nb": 0})]
    assert len({vocabulary.checksum() for vocabulary in [one, *others]}) == 5


# The script: valid inputs


def test_training_examples(run, tmp_path):
    code, stderr = run("0\tthe cat\ta cat sat\t1\n1\tcats\tb c\t0\nno matter\tthe\tthe\t0\n", "train")
    assert code == 0, stderr
    assert features(tmp_path) == [("0", [2, 5, 6, 3, 9, 6, 7, 3], 4, 1), ("1", [2, 6, 8, 3, 11, 13, 3], 4, 0),
                                  ("no matter", [2, 5, 3, 5, 3], 3, 0)]
    assert read_header(tmp_path / "out" / "features")["set_name"] == "train"
    assert sorted(os.listdir(tmp_path / "out")) == ["features", "features.run.json"]


@pytest.mark.parametrize("set_name", ["dev", "test"])
def test_pairs_with_and_without_label(run, tmp_path, set_name):
    assert run("q2#p\tthe\tcat\t1\nq10#p\tthe\tsat\nq1#p\ta\tb\t0\n", set_name)[0] == 0
    assert [(row[0], row[3]) for row in features(tmp_path)] == [("q2#p", 1), ("q10#p", -1), ("q1#p", 0)]


@pytest.mark.parametrize("name", ["pairs.tsv.gz", "pairs.tsv", "pairs"])
@pytest.mark.parametrize("packed", [True, False])
def test_compression_is_recognised_by_content(run, tmp_path, name, packed):
    content = b"q#p\tthe\tcat\nq#r\tthe\tsat\n"
    assert run(gzip.compress(content) if packed else content, name=name)[0] == 0
    assert [row[0] for row in features(tmp_path)] == ["q#p", "q#r"]


@pytest.mark.parametrize("content", [
    b"q#p\tthe\tcat\t1\r\nq#r\tthe\tsat\t0\r\n", b"\xef\xbb\xbfq#p\tthe\tcat\t1\nq#r\tthe\tsat\t0",
    b"\xef\xbb\xbfq#p\tthe\tcat\t1\r\nq#r\tthe\tsat\t0\n", b"q#p\tthe \r cat\tcat\t1\nq#r\tthe\tsat\r\t0\n",
    "q#p\tthe\u2028cat\tcat\t1\nq#r\tthe\tsat\u2029\x85\x0b\x0c\x1c\t0\n".encode(),
    b"q#p\tthe\t\x00cat\t1\nq#r\t.\tsat\t0\n",
])
def test_line_ends_byte_order_marks_and_unusual_separators(run, tmp_path, content):
    code, stderr = run(content)
    assert code == 0, stderr
    assert [(row[0], row[3]) for row in features(tmp_path)] == [("q#p", 1), ("q#r", 0)]
    assert 6 in features(tmp_path)[0][1] and features(tmp_path)[1][1][-2:] == [7, 3]


@pytest.mark.parametrize("name", ["q#p#1", "q##p", "query-1#D1_msmarco_v2.1_doc_00#12#34", "ä#ß", "猫#\U0001f408",
                                  "q,\"1\"#'p'", "q\ufeff#p", "q\u200b#p"])
def test_ids_are_unchanged(run, tmp_path, name):
    assert run(f"a#b\tthe\tcat\n{name}\tthe\tcat\n")[0] == 0
    assert [row[0] for row in features(tmp_path)] == ["a#b", name]


@pytest.mark.parametrize("count", [1, 4, 5, 14])
def test_more_lines_than_one_chunk(run, tmp_path, monkeypatch, count):
    monkeypatch.setattr(tokenize_to_features, "CHUNK_EXAMPLES", 5)
    texts = [" ".join(["cat"] * (1 + number % 4)) for number in range(count)]
    assert run("".join(f"q#{number}\t{text}\tsat\t{number % 2}\n" for number, text in enumerate(texts)))[0] == 0
    assert features(tmp_path) == [
        (f"q#{number}", [2, *[6] * (1 + number % 4), 3, 7, 3], 3 + number % 4, number % 2) for number in range(count)]
    sizes = [len(chunk) for chunk in read_chunks(tmp_path / "out" / "features")]
    assert sizes == [5] * (count // 5) + [count % 5] * (count % 5 > 0)


@pytest.mark.parametrize("length", [8, 9, 256, 65535])
def test_valid_lengths(run, tmp_path, length):
    assert run(f"q#p\t{'cat ' * 70_000}\t{'sat ' * 70_000}\n", max_seq_length=length)[0] == 0
    (_, tokens, query_length, _), = features(tmp_path)
    room = length - 3
    assert len(tokens) == length and query_length == room - room // 2 + 2


def test_one_worker_gives_the_expected_tokens(tmp_path, model):
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"q#{number}\tthe cat\tsat {'a' * (number % 7)}\n" for number in range(300)))
    done = run_script("tokenize_to_features.py", "--set_name", "test", "--raw_data_file", path, "--bert_model_dir",
                      model, "--output_features_file", tmp_path / "one", "--num_workers", 1)
    assert done.returncode == 0 and done.stdout == "" and "300 pairs" in done.stderr, done.stderr
    vocabulary = load_vocabulary(model)
    expected = [naive_pair(vocabulary.tokenizer(), *line.split("\t")[1:], 256)[0]
                for line in path.read_text().splitlines()]
    chunk, = read_chunks(tmp_path / "one")
    assert chunk.tokens.tolist() == [token for tokens in expected for token in tokens]


table_characters = st.characters(codec="utf-8", exclude_characters="\t\n\r")
table_texts = st.text(table_characters, min_size=1, max_size=25).filter(str.strip)
some_words = ["cats", "CAT", "the", "abac", "É", "猫a", "[SEP]", "x" * 101, "\u2028", "ss.ss"]
table_words = st.lists(st.sampled_from(some_words), min_size=1, max_size=15).map(" ".join).filter(str.strip)
id_characters = {"codec": "utf-8", "exclude_categories": ("Z", "C")}
query_ids = st.text(st.characters(**id_characters, exclude_characters="#"), min_size=1, max_size=4)
passage_ids = st.text(st.characters(**id_characters), min_size=1, max_size=4)
tables = st.lists(st.tuples(query_ids, passage_ids, table_texts | table_words, table_texts | table_words,
                            st.sampled_from([None, 0, 1])), min_size=1, max_size=12,
                  unique_by=lambda row: f"{row[0]}#{row[1]}")


@repeated
@given(tables, st.integers(8, 30), st.integers(1, 5), st.booleans(), st.booleans())
def test_any_table_as_in_a_naive_pipeline(run, tmp_path, model, monkeypatch, table, length, chunk,
                                                             packed, windows):
    monkeypatch.setattr(tokenize_to_features, "CHUNK_EXAMPLES", chunk)
    lines = [f"{q}#{p}\t{query}\t{passage}" + ("" if label is None else f"\t{label}")
             for q, p, query, passage, label in table]
    end = "\r\n" if windows else "\n"
    content = "".join(line + end for line in lines).encode()
    code, stderr = run(gzip.compress(content, 1) if packed else content, max_seq_length=length)
    assert code == 0, stderr
    tokenizer = load_vocabulary(model).tokenizer()
    expected = [(f"{q}#{p}", *naive_pair(tokenizer, query, passage, length), -1 if label is None else label)
                for q, p, query, passage, label in table]
    assert features(tmp_path) == expected


# The script: invalid inputs

INVALID_LINES = [
    ("q#p\tthe\tcat\ufeffq#r\tthe\tcat", "joined"), ("q#p\tthe\tcat\rq#r\tthe\tcat", "lines end in"),
    ("", "found 1 tab-separated columns ('')"), ("q#p", "found 1 tab"), ("q#p\tthe", "found 2 tab"),
    ("q#p\tthe\tcat\t1\t", "found 5 tab"), ("q#p\tthe\tca\tt\t1", "found 5 tab"), ("q#p the cat", "found 1 tab"),
    ("q#p\t\tcat", "the query is empty"), ("q#p\tthe\t", "the passage is empty"),
    ("q#p\t \u3000\tcat", "the query is empty"),
    ("q#p\tthe\t\u2028", "the passage is empty"),
    ("q#p\tthe\tcat\t2", "found label '2'"), ("q#p\tthe\tcat\t", "found label ''"),
    ("q#p\tthe\tcat\t 1", "found label ' 1'"),
    ("q#p\tthe\tcat\t-1", "found label"), ("q#p\tthe\tcat\t1.0", "found label"), ("q#p\tthe\tcat\t١", "found label"),
    ("qp\tthe\tcat", "found id 'qp'"), ("#p\tthe\tcat", "found id '#p'"), ("q#\tthe\tcat", "found id 'q#'"),
    ("#\tthe\tcat", "found id '#'"), ("q 1#p\tthe\tcat", "found id"), ("q#p 1\tthe\tcat", "found id"),
    (" q#p\tthe\tcat", "found id"), ("q#p \tthe\tcat", "found id"), ("q\u00a0#p\tthe\tcat", "found id"),
    ("q\r#p\tthe\tcat", "found id"), ("\tthe\tcat", "the id is empty"), ("id\tquery\tpassage", "found id 'id'"),
    ("x" * 10_000, "found 1 tab"),
]
INVALID_TRAINING_LINES = [("a\tthe\tcat", "found 3 tab"), ("", "found 1 tab"), ("\tthe\tcat\t1", "the id is empty"),
                          ("a\tthe\tcat\t2", "found label"), ("a\t\tcat\t1", "the query is empty")]


def assert_rejected(result, tmp_path, *expected):
    """Assert that the script reported exactly these errors and wrote nothing."""
    code, stderr = result
    assert code == 2 and "Traceback" not in stderr
    found = errors(stderr)
    assert len(found) == len(expected), stderr
    for line, (place, reason) in zip(found, expected):
        assert line.startswith(f"{tmp_path / 'pairs.tsv'}{place}") and reason in line and len(line) < 500, line
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(("line", "reason"), INVALID_LINES)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_invalid_pairs(run, tmp_path, line, reason, number):
    lines = ["a#1\tthe\tcat", "a#2\tthe\tcat"]
    lines.insert(number - 1, line)
    assert_rejected(run("\n".join(lines) + "\n"), tmp_path, (f":{number}: ", reason))


@pytest.mark.parametrize(("line", "reason"), INVALID_TRAINING_LINES)
def test_invalid_training_examples(run, tmp_path, line, reason):
    assert_rejected(run(f"0\tthe\tcat\t1\n{line}\n2\tthe\tcat\t0\n", "train"), tmp_path, (":2: ", reason))


@pytest.mark.parametrize("distance", [1, 2, 3000])
def test_duplicate_ids(run, tmp_path, distance):
    lines = [f"q#{number}\tthe\tcat" for number in range(distance)] + ["q#0\tother\ttext"]
    assert_rejected(run("\n".join(lines)), tmp_path, (f":{distance + 1}: ", "id 'q#0' is a duplicate of line 1"))


def test_duplicate_ids_with_and_without_a_byte_order_mark(run, tmp_path):
    assert_rejected(run(b"\xef\xbb\xbfq#p\tthe\tcat\nq#p\tthe\tcat\r\n"), tmp_path, (":2: ", "duplicate of line 1"))


def test_bytes_that_are_not_utf8(run, tmp_path):
    content = b"q#1\tthe\tcat\nq#2\tthe\tcaf\xe9\nq#3\tthe\tcat\n"
    assert_rejected(run(content), tmp_path, (":2: ", "byte 12 of the line (0xe9)"))


def test_all_errors_are_reported_together(run, tmp_path):
    content = b"q#1\tthe\tcat\nq#1\tthe\tcat\n\nq\t\t\tx\nq#2\t\xff\tcat\n"
    assert_rejected(run(content), tmp_path, (":3: ", "columns"), (":4: ", "the query is empty"),
                    (":4: ", "the passage is empty"), (":4: ", "label 'x'"), (":4: ", "found id 'q'"),
                    (":5: ", "not UTF-8"), (":2: ", "duplicate of line 1"))


def test_errors_in_flags_and_lines_are_reported_together(run, tmp_path):
    code, stderr = run(b"q\tthe\tcat\n", max_seq_length=7, bert_model_dir=tmp_path / "no-model",
                     output_features_file=tmp_path / "no" / "features")
    found = errors(stderr)
    assert code == 2 and len(found) == 4
    for reason in ("--max_seq_length 7: expected 8 to 65535", "no-model: no such model directory",
                   "features: its directory does not", "pairs.tsv:1: found id"):
        assert any(reason in line for line in found), (reason, found)


def test_further_errors_are_counted(run, tmp_path):
    code, stderr = run("bad\n" + "".join(f"{number}\tthe\tcat\n" for number in range(50)))
    assert code == 2 and len(errors(stderr)) == 21 and errors(stderr)[-1] == "... and 31 more problems"


def test_truncated_gzip(run, tmp_path):
    packed = gzip.compress(os.urandom(3000).hex().encode() + b"\n" * 3)
    for content in (packed[:-9], packed[:len(packed) // 2], packed[:12]):
        code, stderr = run(content)
        assert code == 2 and os.listdir(tmp_path / "out") == []
        assert re.search(r"pairs\.tsv:\d+: the gzip file is damaged", stderr), stderr


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", gzip.compress(b"", mtime=0)])
def test_empty_files(run, tmp_path, content):
    assert_rejected(run(content), tmp_path, (": ", "is empty"))


def test_missing_file_and_directory_as_file(run, tmp_path):
    assert_rejected(run(None), tmp_path, (": ", "cannot read the pairs: No such file"))
    (tmp_path / "pairs.tsv").mkdir()
    assert_rejected(run(None), tmp_path, (": ", "cannot read the pairs: Is a directory"))


@pytest.mark.parametrize("length", [7, 0, -1, 65536])
def test_invalid_lengths(run, tmp_path, length):
    code, stderr = run("q#p\tthe\tcat\n", max_seq_length=length)
    assert code == 2 and len(errors(stderr)) == 1 and f"--max_seq_length {length}: expected 8 to 65535" in stderr
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("options", [{"max_seq_length": "long"}, {"set_name": "training"}, {"num_workers": "x"}])
def test_invalid_flag_values(run, tmp_path, options):
    code, stderr = run("q#p\tthe\tcat\n", **options)
    assert code == 2 and next(iter(options)) in stderr and os.listdir(tmp_path / "out") == []


def test_output_that_cannot_be_written(run, tmp_path):
    for output, reason in [(tmp_path / "out", "is a directory"), (tmp_path / "no" / "f", "does not exist")]:
        code, stderr = run("q#p\tthe\tcat\n", output_features_file=output)
        assert code == 2 and len(errors(stderr)) == 1 and reason in stderr
    assert os.listdir(tmp_path / "out") == []


def test_more_tokens_than_positions(run, tmp_path, model):
    """Said before a long tokenization: this model cannot read the result."""
    (tmp_path / "short").mkdir()
    for path in model.iterdir():
        (tmp_path / "short" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "short" / "config.json").write_text('{"max_position_embeddings": 128}')
    code, stderr = run("q#1\tw1\tw2\n", bert_model_dir=tmp_path / "short", max_seq_length=128)
    assert code == 0 and "positions" not in stderr
    code, stderr = run("q#1\tw1\tw2\n", bert_model_dir=tmp_path / "short", max_seq_length=129)
    assert code == 0 and "warning: --max_seq_length 129: " in stderr and "has only 128 positions" in stderr


def test_models_without_vocabulary(run, tmp_path):
    (tmp_path / "model").mkdir()
    for name, reason in [(tmp_path / "model", "holds no vocabulary"), ("nobody/nothing", "hub cannot be reached"),
                         (tmp_path / "pairs.tsv", "is a file; name the directory"),
                         ("no-model", "hub cannot be reached"), ("a/b/c", "no such model directory")]:
        code, stderr = run("q#p\tthe\tcat\n", bert_model_dir=name)
        assert code == 2 and len(errors(stderr)) == 1 and reason in stderr and str(name) in stderr
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("content", [b"bad", b"q#p\tthe\tcat\n" * 2, b"\xff\xff\n",
                                     gzip.compress(b"q#p\tthe\tcat", mtime=0)[:-1]])
def test_a_failure_keeps_the_existing_output(run, tmp_path, content):
    (tmp_path / "out" / "features").write_bytes(b"precious")
    assert run(content)[0] == 2
    assert (tmp_path / "out" / "features").read_bytes() == b"precious"
    assert os.listdir(tmp_path / "out") == ["features"]


def test_the_input_is_not_overwritten(run, tmp_path):
    content = b"q#p\tthe\tcat\n"
    (tmp_path / "link").symlink_to(tmp_path / "pairs.tsv")
    for output in (tmp_path / "pairs.tsv", tmp_path / "out" / ".." / "pairs.tsv", tmp_path / "link"):
        code, stderr = run(content, output_features_file=output)
        assert code == 2 and "is also an input" in stderr
        assert (tmp_path / "pairs.tsv").read_bytes() == content


def test_an_input_that_grows_while_it_is_read(run, tmp_path, monkeypatch):
    check = tokenize_to_features.check_pairs

    def check_and_grow(path, *rest):
        pairs = check(path, *rest)
        with open(path, "a") as handle:
            handle.write("q#late\tthe\tcat\n")
        return pairs

    monkeypatch.setattr(tokenize_to_features, "check_pairs", check_and_grow)
    assert_rejected(run("q#p\tthe\tcat\n"), tmp_path, (": ", "changed while it was read: 1 lines, then 2"))


def test_errors_of_the_script_in_a_process(tmp_path, golden_models):
    path = tmp_path / "pairs.tsv"
    path.write_text("q#p\tw7\tw8\nq\tw7\tw8\n\n")
    done = run_script("tokenize_to_features.py", "--set_name", "dev", "--raw_data_file", path, "--output_features_file",
                      tmp_path / "features", "--bert_model_dir", golden_models["teacher"])
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert [line.split(" ")[0] for line in errors(done.stderr)] == [f"{path}:2:", f"{path}:3:"]
    assert os.listdir(tmp_path) == ["pairs.tsv"] and len(tiny_vocabulary()) == 200


def test_a_final_sigma_is_lower_cased_like_the_library():
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "σοφος", "σοφοσ", "οσο"]
    vocabulary = bert_vocabulary({token: number for number, token in enumerate(tokens)}, lower_case=True)
    examples = tokenize(["1\tΣΟΦΟΣ\tΣΟΦΟΣ, ΟΣΟ\t1"], CachedTokenizer(vocabulary, 32))
    assert examples.tokens.tolist() == [2, 5, 3, 5, 1, 6, 3]
