"""The tokenizer of a model directory, as `transformers` makes it from the files there.

What the library makes of them is kept as plain data, which processes can share. One thing differs: the special tokens
of BERT are no added tokens here, so that a literal "[SEP]" in a text stays text and no input can plant one.
"""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from simplified_tinybert.files import UserError, shorten, warn

TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MARK = b"\xef\xbb\xbf"


@dataclass
class Vocabulary:
    """Tokens with their ids, and the tokenizer that finds them in texts.

    `state` is the tokenizer in the JSON format of the `tokenizers` library, BERT's special tokens not among its added
    tokens. With `split_special` no special token of a text is matched (`split_special_tokens` of `transformers`).
    """
    pieces: dict[str, int]
    state: dict
    split_special: bool = False

    @property
    def cls_id(self) -> int:
        return self.pieces["[CLS]"]

    @property
    def sep_id(self) -> int:
        return self.pieces["[SEP]"]

    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(json.dumps(self.state))
        tokenizer.encode_special_tokens = self.split_special
        return tokenizer

    @property
    def lower_case(self) -> bool:
        return "a" in self.normalized("A")

    def normalized(self, text: str) -> str:
        empty = {"type": "WordLevel", "vocab": {}, "unk_token": ""}                     # quickly built
        normalizer = Tokenizer.from_str(json.dumps(self.state | {"model": empty, "added_tokens": []})).normalizer
        return normalizer.normalize_str(text) if normalizer else text

    def with_casing(self, lower_case: bool) -> "Vocabulary":
        """The same tokenizer, made to lower-case texts or to leave capitals. Raises UserError where it cannot be."""
        if self.lower_case == lower_case:
            return self
        normalizer = _with_casing(self.state["normalizer"], lower_case)
        changed = Vocabulary(self.pieces, self.state | {"normalizer": normalizer}, self.split_special)
        if lower_case and not changed.lower_case:
            steps = [*([normalizer] if normalizer else []), {"type": "Lowercase"}]
            changed.state["normalizer"] = {"type": "Sequence", "normalizers": steps}
        if changed.lower_case != lower_case:
            raise UserError("--no-do_lower_case: the model's tokenizer lower-cases texts by a normalizer other than "
                            "BertNormalizer and Lowercase; leave the flag out")
        return changed

    @property
    def splits_at_blanks(self) -> bool:
        """Whether the tokens of a text are those of its parts between blanks.

        BERT's cleaning never looks across a blank: it replaces single characters, and combining marks move no further
        than the next character that is none. An added token may only match across one if it holds one.
        """
        normalizer, added = self.state["normalizer"] or {}, [token["content"] for token in self.state["added_tokens"]]
        return (normalizer.get("type") == "BertNormalizer" and normalizer["clean_text"]
                and self.state["pre_tokenizer"] == {"type": "BertPreTokenizer"}
                and not any(form.split() != [form] for word in added for form in (word, self.normalized(word))))

    def bert_options(self) -> dict | None:
        """The options with which BertTokenizer of `transformers` is this tokenizer; None if it never is."""
        normalizer = self.state["normalizer"] or {}
        if normalizer.get("type") != "BertNormalizer":
            return None
        options = {"do_lower_case": normalizer["lowercase"], "strip_accents": normalizer["strip_accents"],
                   "tokenize_chinese_chars": normalizer["handle_chinese_chars"]}
        return options if self._settings() == bert_vocabulary({}, *options.values())._settings() else None

    def _settings(self) -> dict:
        """All that decides on tokens but the ids of the model's own tokens, and names for the same thing made equal."""
        normalizer, added = self.state["normalizer"], self.state["added_tokens"]
        if normalizer and normalizer.get("strip_accents", "") is None:
            normalizer = normalizer | {"strip_accents": normalizer["lowercase"]}
        return {"normalizer": normalizer, "pre_tokenizer": self.state["pre_tokenizer"], "added_tokens": added,
                "model": {name: value for name, value in self.state["model"].items() if name != "vocab"},
                "split_special": self.split_special and any(token["special"] for token in added)}

    def fingerprint(self) -> str:
        """SHA-256 of the tokens, their ids and, where the tokenizer is not plainly BERT's, its settings.

        Equal for models that can share features, if these are of the same casing.
        """
        ordered = sorted(self.pieces.items(), key=lambda item: item[1])
        lines = [f"{number} {piece}" for piece, number in ordered]
        settings = self._settings()
        if settings != bert_vocabulary({}, self.lower_case)._settings():
            lines.append(json.dumps(settings, sort_keys=True))
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _with_casing(normalizer: dict | None, lower_case: bool) -> dict | None:
    if normalizer is None or normalizer["type"] == "Lowercase":
        return None
    if normalizer["type"] == "Sequence":
        steps = [_with_casing(step, lower_case) for step in normalizer["normalizers"]]
        return normalizer | {"normalizers": [step for step in steps if step]}
    return normalizer | ({"lowercase": lower_case} if normalizer["type"] == "BertNormalizer" else {})


def bert_vocabulary(pieces: dict[str, int], lower_case: bool, strip_accents: bool | None = None,
                    split_chinese: bool = True) -> Vocabulary:
    """BERT's own tokenizer with these tokens. `strip_accents` None: accents go when letters are lower-cased."""
    tokenizer = Tokenizer(WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(handle_chinese_chars=split_chinese, strip_accents=strip_accents,
                                          lowercase=lower_case)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return Vocabulary(dict(pieces), json.loads(tokenizer.to_str()))


def has_vocabulary(folder: Path) -> bool:
    return (folder / "vocab.txt").is_file() or (folder / "tokenizer.json").is_file()


def load_vocabulary(folder: Path, lower_case: bool | None = None) -> Vocabulary:
    """The tokenizer of a model directory. Raises UserError.

    Casing: `lower_case` if given, else that of AutoTokenizer.
    """
    vocabulary = read_tokenizer(folder)[0]
    _check_size(folder, vocabulary)
    if lower_case is not None:
        vocabulary = vocabulary.with_casing(lower_case)
    _check_added(folder, vocabulary)
    own = vocabulary.state["model"]["vocab"]
    if lower_case is None and vocabulary.lower_case and any(piece != piece.lower() for piece in own if not piece.startswith("[")):
        warn(f"{folder}: its tokens have capital letters, but its settings say that texts are lower-cased, as "
             f"transformers reads them; if the model is cased: --no-do_lower_case, or \"do_lower_case\": false in "
             f"tokenizer_config.json")
    return vocabulary


def read_tokenizer(folder: Path) -> tuple[Vocabulary, dict]:
    """The tokenizer of a model directory, and the whole of it in the `tokenizers` format. Raises UserError."""
    declared = _check_files(folder)
    try:
        library = _library_tokenizer(folder)
        backend = library.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        state, split_special = json.loads(backend.to_str()), bool(backend.encode_special_tokens)
    except Exception as error:                          # a malformed file makes the library raise almost anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{folder}: transformers cannot read the tokenizer in its files ({reason}); expected that of "
                        f"a BERT model") from error
    kind, vocab = state["model"].get("type"), state["model"].get("vocab")
    if kind != "WordPiece":
        raise UserError(f"{folder}: holds a {kind} tokenizer; expected WordPiece, as BERT has")
    # The library invents special tokens that no file has.
    state["added_tokens"] = [token for token in state["added_tokens"]
                             if token["content"] not in SPECIAL or token["content"] in vocab.keys() | declared]
    pieces = vocab | {token["content"]: token["id"] for token in state["added_tokens"]}
    missing = [piece for piece in ("[UNK]", "[CLS]", "[SEP]") if piece not in pieces]
    if missing or state["model"]["unk_token"] not in vocab:
        raise UserError(f"{folder}: the vocabulary lacks {', '.join(missing or [state['model']['unk_token']])}; "
                        f"expected a BERT WordPiece vocabulary")
    _check_pair(folder, backend, [pieces["[CLS]"], pieces["[SEP]"], pieces["[SEP]"]])
    special = {piece: pieces[piece] for piece in SPECIAL if piece in pieces}
    own = state | {"model": state["model"] | {"vocab": vocab | special}, "post_processor": None, "decoder": None,
                   "added_tokens": [token for token in state["added_tokens"] if token["content"] not in SPECIAL]}
    vocabulary = Vocabulary(pieces, own, split_special)
    if vocabulary.tokenizer().get_vocab() != pieces:
        raise UserError(f"{folder}: its added tokens leave gaps between ids, which a text cannot be cut by; save its "
                        f"tokenizer anew with transformers")
    return vocabulary, state


def _library_tokenizer(folder: Path):
    """The tokenizer that AutoTokenizer makes of a directory; of one that it cannot place, BertTokenizer."""
    given = {}
    if not (folder / "tokenizer.json").is_file() \
            and (content := (folder / "vocab.txt").read_bytes()).startswith(MARK):      # which the library would keep
        lines = content.removeprefix(MARK).decode("utf-8").removesuffix("\n").split("\n")
        given = {"vocab": {line.rstrip(): number for number, line in enumerate(lines)}}
    if _is_bert(folder):                # imported here for it takes a second, and AutoTokenizer takes several
        from transformers.models.bert.tokenization_bert import BertTokenizer
        return BertTokenizer.from_pretrained(folder, local_files_only=True, **given)
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **given)


def _is_bert(folder: Path) -> bool:
    """Whether AutoTokenizer takes BertTokenizer for this directory, or cannot place it."""
    config, settings = (read_json(folder / name) for name in ("config.json", "tokenizer_config.json"))
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if name is None and config.get("model_type") is None:
        return not (folder / "tokenizer.json").is_file()
    return name in (None, "BertTokenizer", "BertTokenizerFast") and config.get("model_type") in (None, "bert")


def _check_files(folder: Path) -> set[str]:
    """Raise UserError for files that are damaged or not BERT's; returns the tokens that they add to a vocabulary."""
    settings, content, added = (read_json(folder / name) for name in (
        "tokenizer_config.json", "tokenizer.json", "added_tokens.json"))
    if not has_vocabulary(folder):
        raise UserError(f"{folder}: holds no vocabulary; expected vocab.txt or tokenizer.json of a BERT model")
    if (folder / "vocab.txt").is_file():
        try:
            (folder / "vocab.txt").read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{folder / 'vocab.txt'}: is not UTF-8 (byte {error.start}); expected one token a "
                            f"line") from error
    try:
        decoder = (settings.get("added_tokens_decoder") or {}).values()
        declared = added.keys() | {token["content"] for token in [*(content.get("added_tokens") or []), *decoder]}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: its files list added tokens in no known format ({error!r}); fetch them "
                        f"again") from error
    if (folder / "tokenizer.json").is_file():
        _check_tokenizer_json(folder / "tokenizer.json", content)
    return declared


def _check_tokenizer_json(path: Path, content: dict) -> None:
    try:
        kind, vocab = content["model"].get("type", "WordPiece"), content["model"].get("vocab")
    except (KeyError, AttributeError) as error:
        raise UserError(f"{path}: is not a tokenizer file ({error!r}); fetch or write it again") from error
    if kind != "WordPiece" or not isinstance(vocab, dict):
        raise UserError(f"{path}: holds a {kind} tokenizer; expected WordPiece, as BERT has")
    if not all(type(number) is int and 0 <= number < 2 ** 31 for number in vocab.values()):
        raise UserError(f"{path}: holds ids that are not whole numbers from 0; fetch or write it again")


def _check_pair(folder: Path, tokenizer: Tokenizer, expected: list[int]) -> None:
    """Raise UserError if the library puts texts together in another way than [CLS] query [SEP] passage [SEP].

    Without any special tokens it leaves that to whoever uses it.
    """
    pair = tokenizer.encode("", "")
    if pair.ids and (pair.ids, pair.type_ids) != (expected, [0, 0, 1]):
        raise UserError(f"{folder}: its tokenizer puts the tokens {' '.join(pair.tokens)} (segments "
                        f"{' '.join(map(str, pair.type_ids))}) around a pair; expected [CLS] [SEP] [SEP] (0 0 1), as "
                        f"BERT has")


def _check_added(folder: Path, vocabulary: Vocabulary) -> None:
    """Raise UserError for added tokens with which the `tokenizers` library gives no or random ids."""
    forms = {"": "nothing"}
    for token in vocabulary.state["added_tokens"]:
        name, form = shorten(token["content"]), vocabulary.normalized(token["content"])
        if token["normalized"] and form in forms:
            raise UserError(f"{folder}: its added token {name} and {forms[form]} are the same once texts are normalized, "
                            f"so that the tokenizers library takes any of them; remove one")
        if token["normalized"]:
            forms[form] = name


def _check_size(folder: Path, vocabulary: Vocabulary) -> None:
    """Raise UserError if the model has fewer embeddings than tokens."""
    path = next((folder / name for name in ("config.json", "bert_config.json") if (folder / name).is_file()), None)
    size, needed = read_json(path).get("vocab_size") if path else None, max(vocabulary.pieces.values()) + 1
    if type(size) is int and size < needed:
        last = max(vocabulary.pieces, key=vocabulary.pieces.get)
        source = next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()
                       and last in (folder / name).read_text(encoding="utf-8")), folder / "tokenizer.json")
        raise UserError(f"{source}: its token {shorten(last)} has id {needed - 1}, but {path} says vocab_size {size}: "
                        f"the model has no embedding for it, these files do not go together; fetch both from one place")


def read_json(path: Path) -> dict:
    """The object of a JSON file, empty if there is none. Raises UserError."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}); fetch or write the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected a JSON object")
    return content
