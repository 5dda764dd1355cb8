"""Tokenization as the original does it, written anew from its description in pure Python: the baseline.

    python -m benchmarks.original_tokenizer pairs.tsv features.csv vocab.txt 256

In: id <tab> query <tab> passage (<tab> label), UTF-8; a vocabulary. Out, for each pair a row of comma-separated values:
id, label, and padded to the maximum length: ids, mask, segments. As in the original all pairs and all features are in
memory before the first row is written, and special tokens that stand in a text are taken for special tokens. Nothing
but Python's standard library is imported.
"""
import sys
import unicodedata
from pathlib import Path

CONTROL_TOKENS = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
LONGEST_WORD = 100
CHINESE = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
           (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


def is_punctuation(character: str) -> bool:
    code = ord(character)
    if 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126:
        return True
    return unicodedata.category(character).startswith("P")


def clean(text: str) -> str:
    """Without control characters, every white space a blank, blanks around Chinese characters."""
    output = []
    for character in text:
        code = ord(character)
        if character in " \t\n\r" or unicodedata.category(character) == "Zs":
            output.append(" ")
        elif code == 0 or code == 0xFFFD or unicodedata.category(character).startswith("C"):
            continue
        elif any(first <= code <= last for first, last in CHINESE):
            output += [" ", character, " "]
        else:
            output.append(character)
    return "".join(output)


def split_words(text: str) -> list[str]:
    """Words in lower case without accents; each punctuation mark a word."""
    words = []
    for token in clean(text).split():
        if token in CONTROL_TOKENS:
            words.append(token)
            continue
        letters = [character for character in unicodedata.normalize("NFD", token.lower())
                   if unicodedata.category(character) != "Mn"]
        word = ""
        for character in letters:
            if is_punctuation(character):
                words += [word, character] if word else [character]
                word = ""
            else:
                word += character
        words += [word] if word else []
    return words


def cut_word(word: str, vocabulary: dict[str, int]) -> list[str]:
    """Tokens: the longest one that fits, again and again; [UNK] if none does."""
    if len(word) > LONGEST_WORD:
        return ["[UNK]"]
    pieces, start = [], 0
    while start < len(word):
        end = len(word)
        while start < end:
            piece = word[start:end] if start == 0 else "##" + word[start:end]
            if piece in vocabulary:
                break
            end -= 1
        if start == end:
            return ["[UNK]"]
        pieces.append(piece)
        start = end
    return pieces


def tokenize(text: str, vocabulary: dict[str, int]) -> list[str]:
    return [piece for word in split_words(text) for piece in cut_word(word, vocabulary)]


def features(query: str, passage: str, vocabulary: dict[str, int], max_seq_length: int) -> tuple[list[int], ...]:
    """Ids, mask and segments, padded; the longer text loses a piece at a time, the passage at a tie."""
    query_pieces, passage_pieces = tokenize(query, vocabulary), tokenize(passage, vocabulary)
    while len(query_pieces) + len(passage_pieces) > max_seq_length - 3:
        (query_pieces if len(query_pieces) > len(passage_pieces) else passage_pieces).pop()
    pieces = ["[CLS]", *query_pieces, "[SEP]", *passage_pieces, "[SEP]"]
    ids = [vocabulary[piece] for piece in pieces]
    segments = [0] * (len(query_pieces) + 2) + [1] * (len(passage_pieces) + 1)
    padding = [0] * (max_seq_length - len(ids))
    return ids + padding, [1] * len(ids) + padding, segments + padding


def main() -> None:
    pairs_file, output_file, vocab_file, max_seq_length = sys.argv[1:]
    lines = Path(vocab_file).read_text(encoding="utf-8").split("\n")
    vocabulary = {piece: number for number, piece in enumerate(lines) if piece}
    with open(pairs_file, encoding="utf-8", newline="\n") as handle:
        pairs = [line.rstrip("\n").split("\t") for line in handle]
    rows = []
    for example_id, query, passage, *label in pairs:
        rows.append((example_id, label[0] if label else "0",
                     *features(query, passage, vocabulary, int(max_seq_length))))
    with open(output_file, "w", encoding="utf-8") as handle:
        for example_id, label, *numbers in rows:
            handle.write(",".join([example_id, label, *(str(number) for part in numbers for number in part)]) + "\n")


if __name__ == "__main__":
    main()
