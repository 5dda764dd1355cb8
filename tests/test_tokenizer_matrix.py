"""Token ids equal those of transformers, for many kinds of model directories and texts, and also after saving."""
import json
import re
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script, tiny_vocabulary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder as SentenceCrossEncoder
from tokenizers import AddedToken, Regex, Tokenizer, processors
from tokenizers import normalizers as norm
from tokenizers import pre_tokenizers as pre
from tokenizers.models import BPE, WordLevel, WordPiece
from transformers import AutoTokenizer, BertConfig, BertTokenizer

import distill
import reranker
import tokenize_to_features
from simplified_tinybert.common.files import UserError
from simplified_tinybert.data.corpus import map_corpus
from simplified_tinybert.data.features import read_chunks
from simplified_tinybert.model.pretrained import load_cross_encoder, new_cross_encoder, save_cross_encoder
from simplified_tinybert.tokenization.pairs import CachedTokenizer, tokenize, words_suffice
from simplified_tinybert.tokenization.tokenizer_files import load_vocabulary, marks_passages, save_tokenizer
from simplified_tinybert.tokenization.vocabulary import SPECIAL_TOKENS, Vocabulary

SIZE = 420                                              # embeddings of the tiny models
LETTERS = string.ascii_letters + string.digits + "éöÉσςΣı"
TOKENS = [*SPECIAL_TOKENS, *LETTERS, *(f"##{letter}" for letter in LETTERS), *(f"@@{letter}" for letter in LETTERS),
          *"猫日本.,!?'-#[]()_/&+", "##猫", "##-", "flow", "wing", "covid", "cafe", "café", "cat", "paris", "Paris",
          "Flow", "the", "COVID", "##ing", "new", "york", "New", "σοφος", "σοφοσ", "ﬁ", "fi", "\u200b", "😀",
          "[unused1]"]
IDS = {token: number for number, token in enumerate(TOKENS)}
WORDS = ["flow", "FLOW", "Flow", "covid-19", "COVID-19", "Covid-19s", "xcovid-19", "covid-19.", "(covid-19)",
         "covid", "-19", "new york", "New  York", "newyork", "new\tyork", "café", "cafe\u0301", "CAFÉ", "E\u0301",
         "\u0301", "猫", "日本", "a猫b", "日 本", "the", "cat!", "c++", "C++s", "ﬁ", "ﬂow", "Ⅳ", "ｆｌｏｗ", "x" * 9,
         "x" * 100, "x" * 101, "123", "a1b2", "a_b", "don't", "#tag", "[unused1]", "[ENT]", "[ent]", "x[ENT]y", "[Q]",
         "[", "]", "\u2028", "a\u2028b", "\u0085", "a\u0085b", "\u200b", "a\u200bb", "\u200d", "\ufeff", "😀",
         "👩\u200d👩", "\x00", "a\x00b", "\x07", "\r", "\u00a0", "\u3000", "\u00ad", "ΣΟΦΟΣ", "Σ", "σοφος", "İ",
         "İstanbul", "ı", "ß", "ẞ", "\ufffd"]
TEXTS = [*WORDS, "COVID-19 wing", "flow covid-19", "  the   cat  ", " ".join(WORDS), "".join(WORDS), "covid-19covid-19",
         "covid-19 covid-19", "Paris, New York and covid-19."]
ADDED = ["covid-19", "new york", "[Q]", "c++", "猫", "[unused1]", "É"]


def write_json(directory: Path, name: str, **content) -> None:
    (directory / name).write_text(json.dumps(content), encoding="utf-8")


def config(directory: Path, **content) -> None:
    write_json(directory, "config.json", **{"model_type": "bert", "vocab_size": SIZE} | content)


def vocab(directory: Path, tokens: list[str] = TOKENS, end: str = "\n", bom: str = "") -> None:
    (directory / "vocab.txt").write_bytes((bom + "".join(token + end for token in tokens)).encode())


def write_settings(directory: Path, name: str = "BertTokenizer", **content) -> None:
    write_json(directory, "tokenizer_config.json", tokenizer_class=name, **content)


def write_tokenizer_json(directory: Path, normalizer=None, splitter=None, ids: dict[str, int] = IDS, added=(),
                         **model) -> Tokenizer:
    """Write tokenizer.json with the `tokenizers` library."""
    tokenizer = Tokenizer(WordPiece(ids, unk_token="[UNK]", **model))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter or pre.BertPreTokenizer()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens(list(added))
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")])
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


def saved_by_transformers(directory: Path, added=(), special=(), **options) -> None:
    source = directory / "source"
    source.mkdir()
    vocab(source)
    tokenizer = BertTokenizer.from_pretrained(source, **options)
    tokenizer.add_tokens(list(added))
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.save_pretrained(directory)


DIRECTORIES: dict[str, Callable[[Path], object]] = {}


def registered(build: Callable[[Path], object]) -> Callable[[Path], object]:
    """Register a directory under the function's name. The function may return the expected tokenizer."""
    DIRECTORIES[build.__name__] = build
    return build


def with_vocab(title: str, name: str = "BertTokenizer", **content) -> None:
    def build(directory):
        config(directory)
        vocab(directory)
        write_settings(directory, name, **content)
    DIRECTORIES[title] = build


def fast(name: str, class_name: str = "PreTrainedTokenizerFast", more: dict | None = None, **options) -> None:
    def build(directory):
        config(directory)
        write_settings(directory, class_name, **more or {})
        write_tokenizer_json(directory, **options)
    DIRECTORIES[name] = build


def resaved(name: str, **options) -> None:
    def build(directory):
        config(directory)
        saved_by_transformers(directory, **options)
    DIRECTORIES[name] = build


BERT = norm.BertNormalizer()
FLAGGED = [AddedToken("covid-19", single_word=True), AddedToken("[ENT]", lstrip=True, rstrip=True, normalized=False),
           AddedToken("Paris", normalized=False), AddedToken("flow", single_word=True, normalized=False)]

with_vocab("uncased")
with_vocab("cased", do_lower_case=False)
with_vocab("accents kept", strip_accents=False)
with_vocab("accents stripped", strip_accents=True)
with_vocab("cased, accents stripped", do_lower_case=False, strip_accents=True)
with_vocab("accents open", strip_accents=None)
with_vocab("Chinese together", tokenize_chinese_chars=False)
with_vocab("class BertTokenizerFast", name="BertTokenizerFast", do_lower_case=False)
with_vocab("class DistilBertTokenizer", name="DistilBertTokenizerFast", model_input_names=["input_ids"])
with_vocab("class ElectraTokenizer", name="ElectraTokenizer")
with_vocab("more special tokens", additional_special_tokens=["[Q]", "[ENT]"])
with_vocab("special tokens split", additional_special_tokens=["[Q]", "[ENT]"], split_special_tokens=True)
with_vocab("padded left", padding_side="left", truncation_side="left", model_max_length=20)
with_vocab("added_tokens_decoder", added_tokens_decoder={
    str(len(TOKENS) + number): {"content": word, "lstrip": False, "rstrip": False, "single_word": False,
                                "normalized": number != 2, "special": number == 2}
    for number, word in enumerate(("covid-19", "new york", "[Q]"))})
resaved("saved, uncased")
resaved("saved, cased", do_lower_case=False)
resaved("saved, accents kept", strip_accents=False)
resaved("saved with covid-19", added=["covid-19"])
resaved("saved, cased, with covid-19", added=["covid-19"], do_lower_case=False)
resaved("saved with many", added=ADDED)
resaved("saved with many special", special=ADDED)
resaved("saved with flags", added=FLAGGED)
resaved("saved with flags, special", special=FLAGGED)
resaved("saved with odd tokens", added=["日本", "a\u2028b", "CAFÉ", "-", "_", "e\u0301", "x" * 101, "İ"])
fast("NFKC, then Bert", normalizer=norm.Sequence([norm.NFKC(), BERT]))
fast("NFD, Lowercase, StripAccents", normalizer=norm.Sequence([norm.NFD(), norm.Lowercase(), norm.StripAccents()]))
fast("Lowercase", normalizer=norm.Lowercase())
fast("no normalizer")
fast("Replace, then Bert", normalizer=norm.Sequence([norm.Replace(Regex("-"), " "), BERT]))
fast("text not cleaned", normalizer=norm.BertNormalizer(clean_text=False))
fast("Whitespace", normalizer=BERT, splitter=pre.Whitespace())
fast("WhitespaceSplit", normalizer=BERT, splitter=pre.WhitespaceSplit())
fast("Digits, Punctuation", normalizer=BERT, splitter=pre.Sequence(
    [pre.WhitespaceSplit(), pre.Digits(individual_digits=True), pre.Punctuation()]))
fast("prefix @@", normalizer=BERT, continuing_subword_prefix="@@")
fast("words up to 8", normalizer=BERT, max_input_chars_per_word=8)
fast("words without end", normalizer=BERT, max_input_chars_per_word=2 ** 40)
fast("added to Whitespace", normalizer=BERT, splitter=pre.Whitespace(), added=ADDED)
fast("fast, accents kept", normalizer=norm.BertNormalizer(strip_accents=False), more={"do_lower_case": False})
fast("contradiction, fast", normalizer=norm.BertNormalizer(lowercase=False), more={"do_lower_case": True})
fast("contradiction, Bert", "BertTokenizer", normalizer=norm.BertNormalizer(lowercase=False),
     max_input_chars_per_word=8, more={"do_lower_case": True})
fast("class TokenizersBackend", "TokenizersBackend", normalizer=norm.BertNormalizer(lowercase=False), added=FLAGGED)
fast("ids in another order", "BertTokenizer", normalizer=BERT, added=["covid-19"],
     ids={token: len(TOKENS) - 1 - number for number, token in enumerate(TOKENS)})
fast("special tokens only added", normalizer=BERT, added=["covid-19"],
     ids={"[UNK]": 0} | {token: number - 4 for token, number in IDS.items() if number > 4})


@registered
def bert_config_json(directory):
    write_json(directory, "bert_config.json", vocab_size=SIZE)
    vocab(directory)
    return BertTokenizer.from_pretrained(directory)


@registered
def vocab_txt_alone(directory):
    vocab(directory)
    write_settings(directory, None, do_lower_case=False)
    return BertTokenizer.from_pretrained(directory)


@registered
def without_tokenizer_config(directory):
    config(directory)
    vocab(directory)


@registered
def class_in_config_json(directory):
    config(directory, tokenizer_class="BertTokenizerFast")
    vocab(directory)


@registered
def byte_order_mark(directory):
    config(directory)
    vocab(directory)
    expected = AutoTokenizer.from_pretrained(directory)
    vocab(directory, end="\r\n", bom="\ufeff")
    return expected


@registered
def windows_line_ends(directory):
    config(directory)
    vocab(directory, end="\r\n")


@registered
def old_layout(directory):
    """A tokenizer with added tokens as saved by transformers 2 to 4."""
    config(directory)
    vocab(directory)
    write_settings(directory, do_lower_case=True, model_max_length=512, strip_accents=None)
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    write_json(directory, "special_tokens_map.json", **names, additional_special_tokens=["[Q]"])
    added = enumerate(("covid-19", "[Q]", "c++"), len(TOKENS))
    write_json(directory, "added_tokens.json", **{word: number for number, word in added})


@registered
def old_layout_of_both(directory):
    """vocab.txt lacks tokens of tokenizer.json."""
    config(directory)
    vocab(directory)
    write_settings(directory, "BertTokenizerFast", do_lower_case=True)
    write_tokenizer_json(directory, BERT, added=["covid-19", AddedToken("new york", single_word=True)])


@registered
def tokenizer_json_alone(directory):
    write_tokenizer_json(directory, norm.BertNormalizer(strip_accents=False), added=["covid-19"])


@registered
def tokenizer_json_of_a_bert(directory):
    """AutoTokenizer chooses BertTokenizer, which strips accents although tokenizer.json does not."""
    config(directory)
    write_tokenizer_json(directory, norm.BertNormalizer(strip_accents=False), added=["covid-19"],
                         max_input_chars_per_word=8)


@registered
def without_post_processor(directory):
    tokenizer = write_tokenizer_json(directory, BERT)
    content = json.loads(tokenizer.to_str()) | {"post_processor": None, "added_tokens": []}
    write_json(directory, "tokenizer.json", **content)


@registered
def with_padding_and_truncation(directory):
    config(directory)
    tokenizer = write_tokenizer_json(directory, norm.Sequence([norm.NFKC(), BERT]))
    tokenizer.enable_padding(length=30, direction="left")
    tokenizer.enable_truncation(5)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_settings(directory, "PreTrainedTokenizerFast")


@registered
def without_pad_and_mask(directory):
    config(directory)
    vocab(directory, [token for token in TOKENS if token not in ("[PAD]", "[MASK]")])


NAMES = list(DIRECTORIES)
BY_WORDS = {"uncased", "cased", "accents kept", "Chinese together", "prefix @@", "words up to 8", "saved with covid-19",
            "bert_config_json", "byte_order_mark", "old_layout"}
BY_TEXTS = {"NFKC, then Bert", "Lowercase", "no normalizer", "Whitespace", "WhitespaceSplit", "Digits, Punctuation",
            "saved with many", "old_layout_of_both", "text not cleaned"}


def test_the_matrix_is_large():
    assert len(DIRECTORIES) >= 50 and set(NAMES) > BY_WORDS | BY_TEXTS


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], tuple[Path, object]]:
    """Function that returns the directory of a name, built once, and the library's tokenizer for it."""
    done = {}

    def make(name: str) -> tuple[Path, object]:
        if name not in done:
            directory = tmp_path_factory.mktemp("matrix") / "model"
            directory.mkdir()
            expected = DIRECTORIES[name](directory)
            done[name] = directory, expected or AutoTokenizer.from_pretrained(directory)
        return done[name]
    return make


def ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def our_ids(vocabulary: Vocabulary, texts: list[str], by_words: bool | None = None) -> list[list[int]]:
    tokenizer = CachedTokenizer(vocabulary, 8, by_words)
    return [np.frombuffer(tokens, tokenizer.dtype).tolist() for tokens in tokenizer.tokenize_all(texts)]


texts = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=6), st.text("covid-19neyrkÉ猫 [Q]+", max_size=9)),
                 max_size=12)
texts = st.tuples(st.sampled_from(["", " ", "  ", "\u2028"]), texts).map(lambda drawn: drawn[0].join(drawn[1]))


def free_of_special(text: str) -> bool:
    return not any(token in text for token in SPECIAL_TOKENS)


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_transformers(made, name):
    directory, library = made(name)
    vocabulary = load_vocabulary(directory)
    expected = ids(library, TEXTS)
    assert our_ids(vocabulary, TEXTS) == expected
    assert our_ids(vocabulary, TEXTS, by_words=False) == expected


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(texts.filter(free_of_special), max_size=8))
@pytest.mark.parametrize("name", NAMES)
def test_any_text_has_the_ids_of_transformers(made, loaded, name, drawn):
    library, vocabulary = made(name)[1], loaded(name)
    assert our_ids(vocabulary, ["", *drawn]) == ids(library, ["", *drawn])


@pytest.fixture(scope="module")
def loaded(made) -> Callable[[str], Vocabulary]:
    done = {}

    def load(name: str) -> Vocabulary:
        if name not in done:
            done[name] = load_vocabulary(made(name)[0])
        return done[name]
    return load


@pytest.mark.parametrize("name", NAMES)
def test_segments_are_those_of_transformers(made, name):
    directory, library = made(name)
    assert marks_passages(directory) is ("token_type_ids" in library("a", "b"))


@pytest.mark.parametrize("name", sorted(BY_WORDS | BY_TEXTS))
def test_texts_are_tokenized_by_words_if_that_is_equivalent(loaded, capsys, name):
    assert words_suffice(loaded(name), TEXTS) is (name in BY_WORDS)
    assert ("note " in capsys.readouterr().err) is (name in BY_TEXTS)


def test_texts_show_that_tokenizing_by_words_is_not_equivalent(loaded, capsys):
    class Wrong(Vocabulary):
        splits_at_blanks = True

    vocabulary = Wrong(*vars(loaded("saved with many")).values())
    assert words_suffice(vocabulary, ["new cat", "york"]) and not capsys.readouterr().err
    assert not words_suffice(vocabulary, ["new cat", "in new york"]) and "note " in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_in_a_text_stay_text(loaded, name):
    vocabulary = loaded(name)
    special_ids = {vocabulary.token_ids.get(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")}
    for text in ("[SEP]", "a [CLS] b", "[PAD][MASK]x", "[sep] [SEP]"):
        found, = our_ids(vocabulary, [text])
        assert found and not special_ids & set(found)


def test_equal_checksums_mean_equal_ids(loaded):
    seen = {}
    for name in NAMES:
        vocabulary = loaded(name)
        key = vocabulary.checksum(), vocabulary.lower_case
        assert seen.setdefault(key, our_ids(vocabulary, TEXTS)) == our_ids(vocabulary, TEXTS), name
    assert len(seen) > 30
    equal = ("uncased", "accents stripped", "saved, uncased", "bert_config_json", "byte_order_mark", "cased")
    assert len({loaded(name).checksum() for name in equal}) == 1


# Saving


@pytest.mark.parametrize("lower_case", [None, True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_tokenizer_gives_the_same_ids(loaded, made, tmp_path, name, lower_case):
    vocabulary = loaded(name) if lower_case is None else loaded(name).with_casing(lower_case)
    save_tokenizer(made(name)[0], tmp_path, vocabulary.lower_case, 64)
    config(tmp_path)
    expected = ids(made(name)[1], TEXTS) if lower_case is None else our_ids(vocabulary, TEXTS)
    library, saved = AutoTokenizer.from_pretrained(tmp_path), load_vocabulary(tmp_path, None)
    assert ids(library, TEXTS) == expected == our_ids(saved, TEXTS)
    assert (saved.token_ids, saved.lower_case) == (vocabulary.token_ids, vocabulary.lower_case)
    assert saved.checksum() == vocabulary.checksum()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["do_lower_case"] is vocabulary.lower_case
    pair, tokenizer = library("flow covid-19", "the cat"), CachedTokenizer(vocabulary, 64)
    examples = tokenize(["q#p\tflow covid-19\tthe cat"], tokenizer)
    assert pair["input_ids"] == examples.tokens.tolist()
    assert sum(pair["token_type_ids"]) == len(examples.tokens) - examples.query_lengths[0]
    save_tokenizer(tmp_path, tmp_path, vocabulary.lower_case, 64)
    assert ids(AutoTokenizer.from_pretrained(tmp_path), TEXTS) == expected


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = BertConfig(vocab_size=SIZE, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=32, max_position_embeddings=600, initializer_range=0.5)
    return new_cross_encoder(shape, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_cross_encoder_gives_the_same_scores(loaded, made, model, tmp_path, name):
    pairs = [("COVID-19 wing", "flow covid-19"), ("café", "New York c++"), ("猫 flow", "the 日本 cat " * 9),
             ("é", "a1")]
    save_cross_encoder(model, tmp_path, made(name)[0], loaded(name).lower_case)
    lines = [f"q#{number}\t{query}\t{passage}" for number, (query, passage) in enumerate(pairs)]
    examples = tokenize(lines, CachedTokenizer(load_vocabulary(tmp_path), 512))
    with torch.inference_mode():
        ours = load_cross_encoder(tmp_path)[0](examples.batch(np.arange(len(pairs)))).logits
    theirs = SentenceCrossEncoder(str(tmp_path), device="cpu", max_length=512).predict(
        pairs, activation_fn=torch.nn.Identity())
    assert np.allclose(ours.numpy(), theirs, rtol=0, atol=1e-6)
    assert np.ptp(theirs[:, 0]) > 1e-3


def test_all_saved_files_have_the_same_casing(made, tmp_path):
    save_tokenizer(made("saved, uncased")[0], tmp_path, False, 64)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["normalizer"]["lowercase"] is False
    assert BertTokenizer.from_pretrained(tmp_path).tokenize("Paris") == ["Paris"]


# Errors


def check_refused(directory: Path, *parts: str) -> None:
    with pytest.raises(UserError) as raised:
        load_vocabulary(directory)
    message, = str(raised.value).splitlines()
    assert str(directory) in message and all(part in message for part in parts), message


@pytest.mark.parametrize("model_class", [BPE, WordLevel])
@pytest.mark.parametrize("class_name", ["BertTokenizer", "PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_tokenizers_other_than_wordpiece(tmp_path, model_class, class_name):
    more = {"merges": []} if model_class is BPE else {}
    Tokenizer(model_class(vocab=IDS, unk_token="[UNK]", **more)).save(str(tmp_path / "tokenizer.json"))
    write_settings(tmp_path, class_name)
    check_refused(tmp_path, "tokenizer.json", model_class.__name__, "WordPiece")


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("spiece.model",)])
def test_other_vocabulary_files(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    check_refused(tmp_path, "vocab.txt")


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(("content", "what"), [(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
                                               (b"\n<!DOCTYPE html><html>", "web page"), (b'{"', ""), (b"\xff", "")])
def test_failed_downloads(tmp_path, name, content, what):
    vocab(tmp_path)
    config(tmp_path)
    (tmp_path / name).write_bytes(content)
    check_refused(tmp_path, *([str(tmp_path / name), what] if len(content) > 2 else []))


def test_custom_code_is_not_run(tmp_path):
    config(tmp_path)
    vocab(tmp_path)
    write_settings(tmp_path, "OwnTokenizer", auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]})
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OwnTokenizer: pass\n")
    check_refused(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("single", "pair"), [("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
                                              ("[CLS] $A [SEP]", "[CLS]:0 $A:0 [SEP]:0 $B:0 [SEP]:0"),
                                              ("[CLS] $A [SEP]", "[CLS]:0 $B:0 [SEP]:0 $A:1 [SEP]:1"),
                                              ("[CLS] $A [SEP]", "[CLS]:0 $A:1 [SEP]:0 $B:1 [SEP]:1"),
                                              ("[CLS] $A [SEP]", "[CLS]:0 $A:0 [SEP]:0 $B:0 [SEP]:1"),
                                              ("[CLS] $A [SEP]", "$A:0 [CLS]:0 [SEP]:0 $B:1 [SEP]:1")])
def test_other_pair_formats(tmp_path, single, pair):
    tokenizer = write_tokenizer_json(tmp_path, BERT, ids=IDS | {"<s>": len(IDS), "</s>": len(IDS) + 1})
    names = re.findall(r"[\[<]\S+?[\]>]", single)
    tokenizer.post_processor = processors.TemplateProcessing(
        single, pair, [(name, tokenizer.token_to_id(name)) for name in names])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    check_refused(tmp_path, "expected [CLS] query [SEP] passage [SEP]")


@pytest.mark.parametrize(("added", "name"), [(["covid-19", "\u200b"], r"'\u200b'"), (["covid", "COVID"], "'COVID'"),
                                             (["café", "cafe\u0301"], "'cafe")])
def test_added_tokens_that_are_equal_after_normalization(tmp_path, added, name):
    """The library picks one of two at random; with an empty one it panics or fills the memory."""
    write_tokenizer_json(tmp_path, BERT, added=added)
    check_refused(tmp_path, name)
    write_tokenizer_json(tmp_path, norm.BertNormalizer(lowercase=False), added=["covid", "COVID"])
    load_vocabulary(tmp_path)
    with pytest.raises(UserError):
        load_vocabulary(tmp_path, lower_case=True)


@pytest.mark.parametrize("source", ["vocab.txt", "tokenizer.json", "added_tokens.json"])
@pytest.mark.parametrize("name", ["config.json", "bert_config.json"])
def test_a_vocabulary_larger_than_the_model(tmp_path, source, name):
    write_json(tmp_path, name, model_type="bert", vocab_size=len(TOKENS) - (source != "added_tokens.json"))
    vocab(tmp_path)
    if source == "tokenizer.json":
        write_tokenizer_json(tmp_path, BERT)
    if source == "added_tokens.json":
        write_json(tmp_path, source, **{"covid-19": len(TOKENS)})
    check_refused(tmp_path, str(tmp_path / source), str(tmp_path / name))
    write_json(tmp_path, name, model_type="bert", vocab_size=len(TOKENS) + 1)
    load_vocabulary(tmp_path)


# The scripts


def test_the_script_finds_added_tokens_in_several_processes(made, tmp_path):
    directory, library = made("saved with many")
    pairs = [(f"COVID-19 {'wing ' * (n % 3)}", f"in New York {n} covid-19") for n in range(40)]
    (tmp_path / "pairs.tsv").write_text("".join(f"q#{n}\t{q}\t{p}\n" for n, (q, p) in enumerate(pairs)))
    done = run_script("tokenize_to_features.py", "--set_name", "test", "--raw_data_file", tmp_path / "pairs.tsv",
                      "--output_features_file", tmp_path / "features", "--bert_model_dir", directory)
    assert done.returncode == 0 and done.stderr.count("note ") == 1, done.stderr
    chunk, = read_chunks(tmp_path / "features")
    assert chunk.tokens.tolist() == [number for pair in pairs for number in library(*pair)["input_ids"]]


@pytest.mark.parametrize("flag", [None, "--no-do_lower_case", "--do_lower_case"])
@pytest.mark.parametrize("name", ["saved with many", "NFKC, then Bert", "accents kept", "NFD, Lowercase, StripAccents"])
def test_from_pairs_to_scores(made, loaded, model, tmp_path, run_here, name, flag):
    """Teacher, features, student, scores: CrossEncoder gives the same scores, and the chosen casing is kept."""
    flags = [flag] if flag else []
    save_cross_encoder(model, tmp_path / "teacher", made(name)[0], loaded(name).lower_case)
    pairs = [("COVID-19 wing", "flow covid-19"), ("Café", "in New York c++"), ("猫 flow", "the 日本 Cat"),
             ("É", "a1 b")]
    (tmp_path / "train.tsv").write_text("".join(f"{n}\t{q}\t{p}\t{n % 2}\n" for n, (q, p) in enumerate(pairs)))
    (tmp_path / "test.tsv").write_text("".join(f"q#{n}\t{q}\t{p}\n" for n, (q, p) in enumerate(pairs)))
    for kind in ("train", "test"):
        run_here(tokenize_to_features, "--set_name", kind, "--raw_data_file", tmp_path / f"{kind}.tsv",
                 "--output_features_file", tmp_path / kind, "--bert_model_dir", tmp_path / "teacher", *flags)
    output = run_here(distill, "--distill_model", "finetune", "--features_file", tmp_path / "train", "--device", "cpu",
                      "--general_student_model", tmp_path / "teacher", "--output_student_dir", tmp_path / "student",
                      "--num_train_epochs", 1, "--learning_rate", 0, "--cache_file_dir", tmp_path / "cache")
    lower_case = {None: loaded(name).lower_case, "--no-do_lower_case": False, "--do_lower_case": True}[flag]
    assert ("text, the features are" in output) is (lower_case != loaded(name).lower_case)
    output = run_here(reranker, "--model_dir", tmp_path / "student", "--features_file", tmp_path / "test", "--device",
                      "cpu", "--output_scores_file", tmp_path / "scores")
    assert "text, the features are" not in output
    ours = [float(line.split("\t")[2]) for line in (tmp_path / "scores").read_text().splitlines()]
    theirs = SentenceCrossEncoder(str(tmp_path / "student"), device="cpu").predict(pairs, apply_softmax=True)[:, 1]
    assert load_vocabulary(tmp_path / "student").lower_case is lower_case
    assert np.allclose(ours, theirs, rtol=0, atol=1e-6) and np.ptp(theirs) > 1e-3


def test_a_student_with_another_tokenizer_is_refused(made, model, tmp_path, run_here):
    for name in ("saved with covid-19", "saved, uncased", "saved with flags"):
        save_cross_encoder(model, tmp_path / name, made(name)[0], True)
    (tmp_path / "train.tsv").write_text("1\tflow\tcovid-19\t1\n")
    run_here(tokenize_to_features, "--set_name", "train", "--raw_data_file", tmp_path / "train.tsv",
             "--output_features_file", tmp_path / "train", "--bert_model_dir", tmp_path / "saved with covid-19")
    for name in ("saved, uncased", "saved with flags"):
        with pytest.raises(UserError, match=f"{tmp_path / name}: the features were made with a different vocabulary"):
            run_here(distill, "--distill_model", "finetune", "--features_file", tmp_path / "train", "--device", "cpu",
                     "--general_student_model", tmp_path / name, "--output_student_dir", tmp_path / "student")


def test_a_corpus_with_added_tokens(made, tmp_path):
    directory, library = made("saved with many")
    corpus = ("COVID-19 in New York", "猫 c++", "the cat")
    (tmp_path / "corpus.txt").write_text("".join(f"{text}\n" for text in corpus))
    examples = map_corpus([tmp_path / "corpus.txt"], "lines", load_vocabulary(directory), 32, "0", tmp_path / "cache")
    expected = [number for text in corpus for number in library(text)["input_ids"]]
    assert examples.tokens.tolist() == expected


def test_settings_that_change_the_scores_of_other_tools_are_not_saved(tmp_path):
    """CrossEncoder formats pairs with a chat template, and truncates them to model_max_length."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "vocab.txt").write_text("\n".join(tiny_vocabulary()) + "\n")
    (source / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "BertTokenizer", "chat_template": "{{ messages }}", "model_max_length": 20}))
    save_tokenizer(source, target, True, 64)
    saved = AutoTokenizer.from_pretrained(target)
    assert saved.chat_template is None and saved.model_max_length == 64
