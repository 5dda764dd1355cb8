"""The tokenizer of a model directory: read as `transformers` reads it, and written complete.

One thing differs from the library: the special tokens of BERT are no added tokens here, so that a literal "[SEP]" in a
text stays text and no input can plant one.
"""
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from simplified_tinybert.common.files import UserError, atomic_writer, shorten, warn
from simplified_tinybert.common.text import read_text
from simplified_tinybert.model.vocabulary import SPECIAL, Vocabulary

TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json")
MARK = b"\xef\xbb\xbf"
# Settings of a source that tokenizer.json replaces, or under which CrossEncoder would score pairs in another form
LEFT_OUT = ("added_tokens_decoder", "auto_map", "fast_tokenizer_files", "init_inputs", "add_bos_token", "add_eos_token",
            "padding_side", "truncation_side", "chat_template")


def has_vocabulary(directory: Path) -> bool:
    return (directory / "vocab.txt").is_file() or (directory / "tokenizer.json").is_file()


def load_vocabulary(directory: Path, lower_case: bool | None = None) -> Vocabulary:
    """The tokenizer of a model directory. Raises UserError.

    Casing: `lower_case` if given, else that of AutoTokenizer.
    """
    vocabulary = read_tokenizer(directory)[0]
    _check_size(directory, vocabulary)
    if lower_case is not None:
        vocabulary = vocabulary.with_casing(lower_case)
    _check_added(directory, vocabulary)
    own = vocabulary.state["model"]["vocab"]
    capitals = any(piece != piece.lower() for piece in own if not piece.startswith("["))
    if lower_case is None and vocabulary.lower_case and capitals:
        warn(f"{directory}: its tokens have capital letters, but its settings say that texts are lower-cased, as "
             f"transformers reads them; if the model is cased: --no-do_lower_case, or \"do_lower_case\": false in "
             f"tokenizer_config.json")
    return vocabulary


def read_tokenizer(directory: Path) -> tuple[Vocabulary, dict]:
    """The tokenizer of a model directory, and the whole of it in the `tokenizers` format. Raises UserError."""
    _check_files(directory)
    try:
        library = _library_tokenizer(directory)
        backend = library.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        state, split_special = json.loads(backend.to_str()), bool(backend.encode_special_tokens)
        added = _added_by_files(directory)
    except Exception as error:                          # a malformed file makes the library raise almost anything
        settings = read_json(directory / "tokenizer_config.json")
        odd = [f"{name} is {json.dumps(settings[name])}, not true or false" for name in (
            "do_lower_case", "tokenize_chinese_chars") if not isinstance(settings.get(name, True), bool)]
        reason = odd[0] if odd else (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{directory}: transformers cannot read the tokenizer in its files ({reason}); expected that of "
                        f"a BERT model") from error
    kind, vocab = state["model"].get("type"), state["model"].get("vocab")
    if kind != "WordPiece":
        raise UserError(f"{directory}: holds a {kind} tokenizer; expected WordPiece, as BERT has")
    # The library invents special tokens that no file has.
    state["added_tokens"] = [token for token in state["added_tokens"]
                             if token["content"] not in SPECIAL or token["content"] in vocab.keys() | added]
    pieces = vocab | {token["content"]: token["id"] for token in state["added_tokens"]}
    missing = [piece for piece in ("[UNK]", "[CLS]", "[SEP]") if piece not in pieces]
    if missing or state["model"]["unk_token"] not in vocab:
        raise UserError(f"{directory}: the vocabulary lacks {', '.join(missing or [state['model']['unk_token']])}; "
                        f"expected a BERT WordPiece vocabulary")
    _check_pair(directory, backend, [pieces["[CLS]"], pieces["[SEP]"], pieces["[SEP]"]])
    special = {piece: pieces[piece] for piece in SPECIAL if piece in pieces}
    own = state | {"model": state["model"] | {"vocab": vocab | special}, "post_processor": None, "decoder": None,
                   "added_tokens": [token for token in state["added_tokens"] if token["content"] not in SPECIAL]}
    vocabulary = Vocabulary(pieces, own, split_special)
    if vocabulary.tokenizer().get_vocab() != pieces:
        raise UserError(f"{directory}: its added tokens leave gaps between ids, which a text cannot be cut by; save its "
                        f"tokenizer anew with transformers")
    return vocabulary, state


def _library_tokenizer(directory: Path):
    """The tokenizer that AutoTokenizer makes of a directory; of one that it cannot place, BertTokenizer."""
    given = {}
    if not (directory / "tokenizer.json").is_file() \
            and (content := (directory / "vocab.txt").read_bytes()).startswith(MARK):      # which the library would keep
        lines = content.removeprefix(MARK).decode("utf-8").removesuffix("\n").split("\n")
        given = {"vocab": {line.rstrip(): number for number, line in enumerate(lines)}}
    if _is_bert(directory):                # imported here for it takes a second, and AutoTokenizer takes several
        from transformers.models.bert.tokenization_bert import BertTokenizer
        return BertTokenizer.from_pretrained(directory, local_files_only=True, **given)
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **given)


def _is_bert(directory: Path) -> bool:
    """Whether AutoTokenizer takes BertTokenizer for this directory, or cannot place it."""
    config, settings = (read_json(directory / name) for name in ("config.json", "tokenizer_config.json"))
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if name is None and config.get("model_type") is None:
        return not (directory / "tokenizer.json").is_file()
    return name in (None, "BertTokenizer", "BertTokenizerFast") and config.get("model_type") in (None, "bert")


def _check_files(directory: Path) -> None:
    """Raise UserError for files that are damaged or not BERT's, in words clearer than the library's."""
    for name in ("config.json", *TOKENIZER_FILES):
        if (directory / name).is_file():
            with open(directory / name, "rb") as handle:
                start = handle.read(100).lstrip().lower()
            if start.startswith((b"version https://git-lfs", b"<!doctype", b"<html")):
                raise UserError(f"{directory / name}: is a {'web page' if start[:1] == b'<' else 'Git LFS pointer'}, not "
                                f"the file itself; fetch that: git lfs pull in the clone, or hf download")
        if name.endswith(".json"):
            read_json(directory / name)
    if not has_vocabulary(directory):
        raise UserError(f"{directory}: holds no vocabulary; expected vocab.txt or tokenizer.json of a BERT model")
    if (directory / "vocab.txt").is_file():
        read_text(directory / "vocab.txt")
    path = directory / "tokenizer.json"
    if path.is_file():
        content = read_json(path)
        try:
            kind, vocab = content["model"].get("type", "WordPiece"), content["model"].get("vocab")
            _names(content.get("added_tokens") or [])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: is not a tokenizer file ({error!r}); fetch or write it again") from error
        if kind != "WordPiece" or not isinstance(vocab, dict):
            raise UserError(f"{path}: holds a {kind} tokenizer; expected WordPiece, as BERT has")
        if not all(type(number) is int and 0 <= number < 2 ** 31 for number in vocab.values()):
            raise UserError(f"{path}: holds ids that are not whole numbers from 0; fetch or write it again")


def _names(tokens: Iterable[dict]) -> set[str]:
    return {token["content"] for token in tokens}


def _added_by_files(directory: Path) -> set[str]:
    """Tokens that the files of a directory, known to be right, add to its vocabulary."""
    decoder = read_json(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
    return (_names(read_json(directory / "tokenizer.json").get("added_tokens") or []) | _names(decoder.values())
            | read_json(directory / "added_tokens.json").keys())


def _check_pair(directory: Path, tokenizer: Tokenizer, expected: list[int]) -> None:
    """Raise UserError if the library puts texts together in another way than [CLS] query [SEP] passage [SEP].

    Without any special tokens it leaves that to whoever uses it.
    """
    pair = tokenizer.encode("", "")
    if pair.ids and (pair.ids, pair.type_ids) != (expected, [0, 0, 1]):
        raise UserError(f"{directory}: its tokenizer puts the tokens {' '.join(pair.tokens)} (segments "
                        f"{' '.join(map(str, pair.type_ids))}) around a pair; expected [CLS] [SEP] [SEP] (0 0 1), as "
                        f"BERT has")


def _check_added(directory: Path, vocabulary: Vocabulary) -> None:
    """Raise UserError for added tokens with which the `tokenizers` library gives no or random ids."""
    forms = {"": "nothing"}
    for token in vocabulary.state["added_tokens"]:
        name, form = shorten(token["content"]), vocabulary.normalized(token["content"])
        if token["normalized"] and form in forms:
            raise UserError(f"{directory}: its added token {name} and {forms[form]} are the same when normalized, so "
                            f"that the tokenizers library takes any of them; remove one")
        if token["normalized"]:
            forms[form] = name


def _check_size(directory: Path, vocabulary: Vocabulary) -> None:
    """Raise UserError if the model has fewer embeddings than tokens."""
    path = next((directory / name for name in ("config.json", "bert_config.json") if (directory / name).is_file()), None)
    size, needed = read_json(path).get("vocab_size") if path else None, max(vocabulary.pieces.values()) + 1
    if type(size) is int and size < needed:
        last = max(vocabulary.pieces, key=vocabulary.pieces.get)
        source = next((directory / name for name in ("tokenizer.json", *TOKENIZER_FILES) if (directory / name).is_file()
                       and last in (directory / name).read_text(encoding="utf-8")), directory / "tokenizer.json")
        raise UserError(f"{source}: has {needed} tokens, the embedding matrix {size} rows (vocab_size in {path}): "
                        f"these two files of the model do not go together; fetch both from one place or, if tokens "
                        f"were added, call resize_token_embeddings({needed}) and save the model again")


def read_json(path: Path) -> dict:
    """The object of a JSON file, empty if there is none. Raises UserError."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}); fetch or write the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected a JSON object")
    return content


def save_tokenizer(source: Path, directory: Path, lower_case: bool, max_length: int) -> None:
    """Write the tokenizer of directory `source`, with the casing in use, into `directory`.

    Where it is plainly BERT's, it is vocab.txt with the options of BertTokenizer; else tokenizer.json says all. Both
    are written where they can be, for tools that know only one of them.
    """
    vocabulary, whole = read_tokenizer(source)
    vocabulary = vocabulary.with_casing(lower_case)
    options, lines = vocabulary.bert_options(), vocab_lines(whole["model"]["vocab"])
    settings = read_json(source / "special_tokens_map.json") | read_json(source / "tokenizer_config.json")
    settings = {name: value for name, value in settings.items() if name not in LEFT_OUT}
    settings |= {"tokenizer_class": "BertTokenizer" if options else "PreTrainedTokenizerFast",
                 "model_max_length": max_length, "do_lower_case": lower_case,
                 "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    settings |= options or {}
    settings |= {f"{piece[1:-1].lower()}_token": piece if piece in vocabulary.pieces else "[UNK]" for piece in SPECIAL}
    texts = {"tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}
    if lines:
        texts["vocab.txt"] = lines
    if not (options and lines) or (source / "tokenizer.json").is_file():
        texts["tokenizer.json"] = json.dumps(as_bert_pairs(whole, vocabulary), ensure_ascii=False, indent=2) + "\n"
    for name in TOKENIZER_FILES:
        if name in texts:
            with atomic_writer(directory / name) as handle:
                handle.write(texts[name])
        else:
            (directory / name).unlink(missing_ok=True)     # of a model that was here before


def as_bert_pairs(whole: dict, vocabulary: Vocabulary) -> dict:
    """The tokenizer with the casing of `vocabulary`; pairs become [CLS] query [SEP] passage [SEP], as here."""
    ends = {name: [f"[{name.upper()}]", vocabulary.pieces[f"[{name.upper()}]"]] for name in ("sep", "cls")}
    return whole | {"normalizer": vocabulary.state["normalizer"], "post_processor": {"type": "BertProcessing"} | ends}


def vocab_lines(vocab: dict[str, int]) -> str:
    """The text of vocab.txt; empty if such a file cannot hold these tokens."""
    pieces = sorted(vocab, key=vocab.get)
    fits = [vocab[piece] for piece in pieces] == list(range(len(pieces))) and not any(
        piece != piece.rstrip() or "\n" in piece or piece.startswith("\ufeff") for piece in pieces)
    return "".join(f"{piece}\n" for piece in pieces) if fits else ""
