"""A tokenizer as plain data, which can be sent to other processes."""
import hashlib
import json
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from simplified_tinybert.common.files import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass
class Vocabulary:
    """Token ids, and the tokenizer that splits texts into these tokens.

    `state` is the tokenizer in the JSON format of the `tokenizers` library, without BERT's special tokens among its
    added tokens. With `split_special`, special tokens in a text are split (`split_special_tokens` of `transformers`).
    """
    token_ids: dict[str, int]
    state: dict
    split_special: bool = False

    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(json.dumps(self.state))
        tokenizer.encode_special_tokens = self.split_special
        return tokenizer

    @property
    def lower_case(self) -> bool:
        return "a" in self.normalized("A")

    def normalized(self, text: str) -> str:
        empty = {"type": "WordLevel", "vocab": {}, "unk_token": ""}     # faster to build than the real model
        normalizer = Tokenizer.from_str(json.dumps(self.state | {"model": empty, "added_tokens": []})).normalizer
        return normalizer.normalize_str(text) if normalizer else text

    def with_casing(self, lower_case: bool) -> "Vocabulary":
        """Return the same tokenizer with or without lower-casing. Raises UserError if that is impossible."""
        if self.lower_case == lower_case:
            return self
        normalizer = _with_casing(self.state["normalizer"], lower_case)
        changed = Vocabulary(self.token_ids, self.state | {"normalizer": normalizer}, self.split_special)
        if lower_case and not changed.lower_case:
            steps = [*([normalizer] if normalizer else []), {"type": "Lowercase"}]
            changed.state["normalizer"] = {"type": "Sequence", "normalizers": steps}
        if changed.lower_case != lower_case:
            raise UserError("--no-do_lower_case: the model's tokenizer lower-cases texts with a normalizer other than "
                            "BertNormalizer and Lowercase; leave the flag out")
        return changed

    @property
    def splits_at_blanks(self) -> bool:
        """Whether a text can be split at blanks first, without changing its tokens.

        BERT's normalizer never looks across a blank: it replaces single characters, and reorders combining marks only
        up to the next base character. An added token can match across a blank only if it contains one.
        """
        normalizer, added = self.state["normalizer"] or {}, [token["content"] for token in self.state["added_tokens"]]
        return (normalizer.get("type") == "BertNormalizer" and normalizer["clean_text"]
                and self.state["pre_tokenizer"] == {"type": "BertPreTokenizer"}
                and not any(form.split() != [form] for token in added for form in (token, self.normalized(token))))

    def bert_options(self) -> dict | None:
        """Return options of `transformers`' BertTokenizer that make it equal to this tokenizer, or None."""
        normalizer = self.state["normalizer"] or {}
        if normalizer.get("type") != "BertNormalizer":
            return None
        options = {"do_lower_case": normalizer["lowercase"], "strip_accents": normalizer["strip_accents"],
                   "tokenize_chinese_chars": normalizer["handle_chinese_chars"]}
        return options if self._settings() == bert_vocabulary({}, *options.values())._settings() else None

    def _settings(self) -> dict:
        """Return everything but the token ids that determines the tokens of a text, in a normal form."""
        normalizer, added = self.state["normalizer"], self.state["added_tokens"]
        if normalizer and normalizer.get("strip_accents", "") is None:
            normalizer = normalizer | {"strip_accents": normalizer["lowercase"]}
        return {"normalizer": normalizer, "pre_tokenizer": self.state["pre_tokenizer"], "added_tokens": added,
                "model": {name: value for name, value in self.state["model"].items() if name != "vocab"},
                "split_special": self.split_special and any(token["special"] for token in added)}

    def checksum(self) -> str:
        """Return a SHA-256 of token ids and settings. Models with the same checksum and casing can share features."""
        lines = [f"{number} {token}" for token, number in sorted(self.token_ids.items(), key=lambda item: item[1])]
        settings = self._settings()
        if settings != bert_vocabulary({}, self.lower_case)._settings():        # not BERT's own tokenizer
            lines.append(json.dumps(settings, sort_keys=True))
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _with_casing(normalizer: dict | None, lower_case: bool) -> dict | None:
    if normalizer is None or normalizer["type"] == "Lowercase":
        return None
    if normalizer["type"] == "Sequence":
        steps = [_with_casing(step, lower_case) for step in normalizer["normalizers"]]
        return normalizer | {"normalizers": [step for step in steps if step]}
    return normalizer | ({"lowercase": lower_case} if normalizer["type"] == "BertNormalizer" else {})


def bert_vocabulary(token_ids: dict[str, int], lower_case: bool, strip_accents: bool | None = None,
                    split_chinese: bool = True) -> Vocabulary:
    """Return BERT's own tokenizer with these tokens. strip_accents=None strips accents if texts are lower-cased."""
    tokenizer = Tokenizer(WordPiece(token_ids, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(handle_chinese_chars=split_chinese, strip_accents=strip_accents,
                                          lowercase=lower_case)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return Vocabulary(dict(token_ids), json.loads(tokenizer.to_str()))
