"""The tokens of a model and the tokenizer that finds them, as plain data, which processes can share."""
import hashlib
import json
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from simplified_tinybert.common.files import UserError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


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

    def checksum(self) -> str:
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
