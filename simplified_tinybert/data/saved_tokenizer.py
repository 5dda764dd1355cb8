"""The tokenizer of a model that is written: complete, so that other tools make the same ids of the same texts."""
import json
from pathlib import Path

from simplified_tinybert.data.vocabulary import SPECIAL, TOKENIZER_FILES, Vocabulary, read_json, read_tokenizer
from simplified_tinybert.files import atomic_writer

# Settings of a source that tokenizer.json replaces, or under which CrossEncoder would score pairs in another form
LEFT_OUT = ("added_tokens_decoder", "auto_map", "fast_tokenizer_files", "init_inputs", "add_bos_token", "add_eos_token",
            "model_input_names", "padding_side", "truncation_side")


def save_tokenizer(source: Path, folder: Path, lower_case: bool, max_length: int) -> None:
    """Write the tokenizer of directory `source`, with the casing in use, into `folder`.

    Where it is plainly BERT's, it is vocab.txt with the options of BertTokenizer; else tokenizer.json says all. Both
    are written where they can be, for tools that know only one of them.
    """
    vocabulary, whole = read_tokenizer(source)
    vocabulary = vocabulary.with_casing(lower_case)
    options, lines = vocabulary.bert_options(), vocab_lines(whole["model"]["vocab"])
    settings = read_json(source / "special_tokens_map.json") | read_json(source / "tokenizer_config.json")
    settings = {name: value for name, value in settings.items() if name not in LEFT_OUT}
    settings |= {"tokenizer_class": "BertTokenizer" if options else "PreTrainedTokenizerFast",
                 "model_max_length": settings.get("model_max_length", max_length), "do_lower_case": lower_case}
    settings |= options or {}
    settings |= {f"{piece[1:-1].lower()}_token": piece if piece in vocabulary.pieces else "[UNK]" for piece in SPECIAL}
    texts = {"tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}
    if lines:
        texts["vocab.txt"] = lines
    if not (options and lines) or (source / "tokenizer.json").is_file():
        texts["tokenizer.json"] = json.dumps(as_bert_pairs(whole, vocabulary), ensure_ascii=False, indent=2) + "\n"
    for name in TOKENIZER_FILES:
        if name in texts:
            with atomic_writer(folder / name) as handle:
                handle.write(texts[name])
        else:
            (folder / name).unlink(missing_ok=True)     # of a model that was here before


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
