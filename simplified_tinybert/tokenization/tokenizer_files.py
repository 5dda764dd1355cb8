"""Read and write the tokenizer of a model directory, as `transformers` does, with one exception.

BERT's special tokens are not added tokens here: a literal "[SEP]" in a text stays text, and no input can insert a
special token.
"""
import json
from codecs import BOM_UTF8
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from simplified_tinybert.common.files import UserError, atomic_writer, reason, shorten, warn
from simplified_tinybert.common.text import failed_download, read_json, read_text
from simplified_tinybert.tokenization.vocabulary import SPECIAL_TOKENS, Vocabulary

TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json")
# Settings that tokenizer.json replaces, or that would make CrossEncoder format pairs differently
DROPPED_SETTINGS = ("added_tokens_decoder", "auto_map", "fast_tokenizer_files", "init_inputs", "add_bos_token",
                    "add_eos_token", "padding_side", "truncation_side", "chat_template")


def has_vocabulary(directory: Path) -> bool:
    return (directory / "vocab.txt").is_file() or (directory / "tokenizer.json").is_file()


def load_vocabulary(directory: Path, lower_case: bool | None = None) -> Vocabulary:
    """Load the tokenizer of a model directory. lower_case=None: with AutoTokenizer's casing. Raises UserError."""
    vocabulary, state = read_tokenizer(directory)
    if not state["post_processor"]:
        warn(f"{directory}: its tokenizer adds no [CLS] and [SEP], so transformers scores pairs without them; these "
             f"scripts add them, as in BERT; set \"tokenizer_class\": \"BertTokenizer\" in tokenizer_config.json, and "
             f"transformers does it, too")
    _check_size(directory, vocabulary)
    if lower_case is not None:
        vocabulary = vocabulary.with_casing(lower_case)
    _check_added_tokens(directory, vocabulary)
    has_capitals = any(token != token.lower() for token in vocabulary.state["model"]["vocab"]
                       if not token.startswith("["))
    if lower_case is None and vocabulary.lower_case and has_capitals:
        warn(f"{directory}: its vocabulary has capital letters, but transformers lower-cases texts with its settings; "
             f"if the model is cased, use --no-do_lower_case, or set \"do_lower_case\": false in "
             f"tokenizer_config.json")
    return vocabulary


def read_tokenizer(directory: Path) -> tuple[Vocabulary, dict]:
    """Return the tokenizer of a model directory, and its full `tokenizers` JSON. Raises UserError."""
    _check_files(directory)
    try:
        backend = _library_tokenizer(directory).backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        state, split_special = json.loads(backend.to_str()), bool(backend.encode_special_tokens)
        added = _added_tokens_in_files(directory)
    except Exception as error:                          # the library raises almost any error for a malformed file
        settings = read_json(directory / "tokenizer_config.json")
        invalid = [f"{name} is {json.dumps(settings[name])}, expected true or false" for name in (
            "do_lower_case", "tokenize_chinese_chars") if not isinstance(settings.get(name, True), bool)]
        raise UserError(f"{directory}: transformers cannot read its tokenizer files "
                        f"({invalid[0] if invalid else reason(error)}); expected those of a BERT model") from error
    kind, vocab = state["model"].get("type"), state["model"].get("vocab")
    if kind != "WordPiece":
        raise UserError(f"{directory}: holds a {kind} tokenizer; expected WordPiece, as in BERT")
    # The library adds special tokens that are in no file
    state["added_tokens"] = [token for token in state["added_tokens"]
                             if token["content"] not in SPECIAL_TOKENS or token["content"] in vocab.keys() | added]
    token_ids = vocab | {token["content"]: token["id"] for token in state["added_tokens"]}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in token_ids]
    if missing or state["model"]["unk_token"] not in vocab:
        raise UserError(f"{directory}: the vocabulary lacks {', '.join(missing or [state['model']['unk_token']])}; "
                        f"expected a BERT WordPiece vocabulary")
    if not _adds_special_tokens(directory, backend, token_ids["[CLS]"], token_ids["[SEP]"]):
        state["post_processor"] = None
    special = {token: token_ids[token] for token in SPECIAL_TOKENS if token in token_ids}
    own_state = state | {"model": state["model"] | {"vocab": vocab | special}, "post_processor": None, "decoder": None,
                         "added_tokens": [token for token in state["added_tokens"] if token["content"] not in special]}
    vocabulary = Vocabulary(token_ids, own_state, split_special)
    if vocabulary.tokenizer().get_vocab() != token_ids:
        raise UserError(f"{directory}: its added tokens leave gaps between ids; save them again with transformers")
    return vocabulary, state


def _library_tokenizer(directory: Path):
    """Load the tokenizer as AutoTokenizer does, or as BertTokenizer if AutoTokenizer cannot determine the class."""
    options = {}
    if not (directory / "tokenizer.json").is_file() \
            and (content := (directory / "vocab.txt").read_bytes()).startswith(BOM_UTF8):     # the library keeps a BOM
        lines = content.removeprefix(BOM_UTF8).decode("utf-8").removesuffix("\n").split("\n")
        options = {"vocab": {line.rstrip(): number for number, line in enumerate(lines)}}
    if _is_bert(directory):                             # importing AutoTokenizer takes several seconds longer
        from transformers.models.bert.tokenization_bert import BertTokenizer
        return BertTokenizer.from_pretrained(directory, local_files_only=True, **options)
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **options)


def _is_bert(directory: Path) -> bool:
    """Whether AutoTokenizer would choose BertTokenizer for this directory, or cannot determine the class."""
    config, settings = (read_json(directory / name) for name in ("config.json", "tokenizer_config.json"))
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if name is None and config.get("model_type") is None:
        return not (directory / "tokenizer.json").is_file()
    return name in (None, "BertTokenizer", "BertTokenizerFast") and config.get("model_type") in (None, "bert")


def _check_files(directory: Path) -> None:
    """Raise UserError for files that are damaged or not BERT's, with clearer messages than the library's."""
    for name in ("config.json", *TOKENIZER_FILES[2:]):  # the first two are read below
        read_json(directory / name)
    if not has_vocabulary(directory):
        raise UserError(f"{directory}: holds no vocabulary; expected vocab.txt or tokenizer.json of a BERT model")
    path = directory / "vocab.txt"
    if path.is_file():
        if error := failed_download(path):
            raise UserError(f"{path}: {error}")
        read_text(path)
    path = directory / "tokenizer.json"
    if path.is_file():
        content = read_json(path)
        try:
            kind, vocab = content["model"].get("type", "WordPiece"), content["model"].get("vocab")
            _contents(content.get("added_tokens") or [])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: is not a tokenizer file ({error!r}); fetch or write it again") from error
        if kind != "WordPiece" or not isinstance(vocab, dict):
            vocab_of = "" if isinstance(vocab, dict) else f" whose vocabulary is a {type(vocab).__name__}"
            raise UserError(f"{path}: holds a {kind} tokenizer{vocab_of}; expected WordPiece with a dictionary of "
                            f"tokens and ids, as in BERT")
        if not all(type(number) is int and 0 <= number < 2 ** 31 for number in vocab.values()):
            raise UserError(f"{path}: holds token ids that are not whole numbers from 0; fetch or write it again")


def _contents(tokens: Iterable[dict]) -> set[str]:
    return {token["content"] for token in tokens}


def _added_tokens_in_files(directory: Path) -> set[str]:
    decoder = read_json(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
    return (_contents(read_json(directory / "tokenizer.json").get("added_tokens") or []) | _contents(decoder.values())
            | read_json(directory / "added_tokens.json").keys())


def _adds_special_tokens(directory: Path, tokenizer: Tokenizer, cls: int, sep: int) -> bool:
    """Whether the library formats pairs as [CLS] query [SEP] passage [SEP]. Raises UserError for other formats."""
    words = Tokenizer(WordLevel({"query": 0, "passage": 1}, unk_token="query"))
    pair = tokenizer.post_process(words.encode("query"), words.encode("passage"))
    adds_tokens = pair.tokens != ["query", "passage"]
    if adds_tokens and (pair.ids, pair.type_ids) != ([cls, 0, sep, 1, sep], [0, 0, 0, 1, 1]):
        raise UserError(f"{directory}: its tokenizer formats a pair as {' '.join(pair.tokens)} (segments "
                        f"{' '.join(map(str, pair.type_ids))}); expected [CLS] query [SEP] passage [SEP] (0 0 0 1 1), "
                        f"as in BERT")
    return adds_tokens


def marks_passages(directory: Path) -> bool:
    """Whether the library gives the tokens of passages another segment (token type) than those of queries."""
    if not has_vocabulary(directory):
        return True
    names = read_json(directory / "tokenizer_config.json").get("model_input_names")
    if names is None and not _is_bert(directory):
        names = _library_tokenizer(directory).model_input_names
    return names is None or "token_type_ids" in names


def _check_added_tokens(directory: Path, vocabulary: Vocabulary) -> None:
    """Raise UserError for added tokens that the `tokenizers` library maps to no id or to a random one."""
    seen = {"": "the empty string"}
    for content in (token["content"] for token in vocabulary.state["added_tokens"] if token["normalized"]):
        name, form = shorten(content), vocabulary.normalized(content)
        if form in seen:
            raise UserError(f"{directory}: its added token {name} and {seen[form]} are equal after normalization, so "
                            f"the tokenizers library may use either; remove one")
        seen[form] = name


def _check_size(directory: Path, vocabulary: Vocabulary) -> None:
    """Raise UserError if the model has fewer embeddings than tokens."""
    paths = [directory / name for name in ("config.json", "bert_config.json") if (directory / name).is_file()]
    size = read_json(paths[0]).get("vocab_size") if paths else None
    needed = max(vocabulary.token_ids.values()) + 1
    if type(size) is int and size < needed:
        last = max(vocabulary.token_ids, key=vocabulary.token_ids.get)
        source = next((directory / name for name in ("tokenizer.json", *TOKENIZER_FILES) if (directory / name).is_file()
                       and last in (directory / name).read_text(encoding="utf-8")), directory / "tokenizer.json")
        raise UserError(f"{source}: has {needed} tokens, but the embedding matrix has {size} rows (vocab_size in "
                        f"{paths[0]}); fetch both files from the same model; if tokens were added, call "
                        f"resize_token_embeddings({needed}) and save the model again")


def save_tokenizer(source: Path, directory: Path, lower_case: bool, max_length: int) -> None:
    """Write the tokenizer of directory `source`, with the given casing, into `directory`.

    Writes vocab.txt and BertTokenizer's options if these describe it, and otherwise tokenizer.json. If `source` has a
    tokenizer.json, both are written, since some tools read only one of them.
    """
    vocabulary, state = read_tokenizer(source)
    vocabulary = vocabulary.with_casing(lower_case)
    options, lines = vocabulary.bert_options(), vocab_lines(state["model"]["vocab"])
    settings = read_json(source / "special_tokens_map.json") | read_json(source / "tokenizer_config.json")
    settings = {name: value for name, value in settings.items() if name not in DROPPED_SETTINGS}
    settings |= {"tokenizer_class": "BertTokenizer" if options else "PreTrainedTokenizerFast",
                 "model_max_length": max_length, "do_lower_case": lower_case,
                 "model_input_names": ["input_ids", "token_type_ids", "attention_mask"], **(options or {})}
    settings |= {f"{token[1:-1].lower()}_token": token if token in vocabulary.token_ids else "[UNK]"
                 for token in SPECIAL_TOKENS}
    texts = {"tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}
    if lines:
        texts["vocab.txt"] = lines
    if not (options and lines) or (source / "tokenizer.json").is_file():
        ends = {name: [f"[{name.upper()}]", vocabulary.token_ids[f"[{name.upper()}]"]] for name in ("sep", "cls")}
        state |= {"normalizer": vocabulary.state["normalizer"], "post_processor": {"type": "BertProcessing"} | ends}
        texts["tokenizer.json"] = json.dumps(state, ensure_ascii=False, indent=2) + "\n"
    for name in TOKENIZER_FILES:
        if name in texts:
            with atomic_writer(directory / name) as handle:
                handle.write(texts[name])
        else:
            (directory / name).unlink(missing_ok=True)  # left over from another model


def vocab_lines(vocab: dict[str, int]) -> str:
    """Return the text of vocab.txt, or "" if these tokens cannot be written to such a file."""
    tokens = sorted(vocab, key=vocab.get)
    representable = [vocab[token] for token in tokens] == list(range(len(tokens))) and not any(
        token != token.rstrip() or "\n" in token or token.startswith("\ufeff") for token in tokens)
    return "".join(f"{token}\n" for token in tokens) if representable else ""
