"""The baseline: tokenizes as the original does, in pure Python, rewritten from a description of it.

    python -m benchmarks.original_tokenizer pairs.tsv features.csv vocab.txt 256

In: id <tab> query <tab> passage (<tab> label), UTF-8; a vocabulary.
Out: one row of comma-separated values per pair: id, label; ids, mask and segments, padded to the maximum length.
As in the original, all features are in memory before the first row is written, and literal special tokens in a text
become special tokens. Only the standard library is used.
"""
import sys
import unicodedata
from pathlib import Path

SPECIAL_TOKENS = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
LONGEST_WORD = 100
CHINESE = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
           (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


def is_punctuation(character: str) -> bool:
    code = ord(character)
    if 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126:
        return True
    return unicodedata.category(character).startswith("P")


def clean(text: str) -> str:
    """Drop control characters, turn white space into blanks, and put blanks around Chinese characters."""
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
    """Split into lower-case words without accents. Each punctuation mark is a word."""
    words = []
    for token in clean(text).split():
        if token in SPECIAL_TOKENS:
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


def wordpiece(word: str, vocabulary: dict[str, int]) -> list[str]:
    """Split a word into tokens, greedily taking the longest match. [UNK] if there is no match."""
    if len(word) > LONGEST_WORD:
        return ["[UNK]"]
    tokens, start = [], 0
    while start < len(word):
        end = len(word)
        while start < end:
            token = word[start:end] if start == 0 else "##" + word[start:end]
            if token in vocabulary:
                break
            end -= 1
        if start == end:
            return ["[UNK]"]
        tokens.append(token)
        start = end
    return tokens


def tokenize(text: str, vocabulary: dict[str, int]) -> list[str]:
    return [token for word in split_words(text) for token in wordpiece(word, vocabulary)]


def features(query: str, passage: str, vocabulary: dict[str, int], max_seq_length: int) -> tuple[list[int], ...]:
    """Return padded ids, mask and segments. The longer text is truncated, or the passage if both are equally long."""
    query_tokens, passage_tokens = tokenize(query, vocabulary), tokenize(passage, vocabulary)
    while len(query_tokens) + len(passage_tokens) > max_seq_length - 3:
        (query_tokens if len(query_tokens) > len(passage_tokens) else passage_tokens).pop()
    ids = [vocabulary[token] for token in ("[CLS]", *query_tokens, "[SEP]", *passage_tokens, "[SEP]")]
    segments = [0] * (len(query_tokens) + 2) + [1] * (len(passage_tokens) + 1)
    padding = [0] * (max_seq_length - len(ids))
    return ids + padding, [1] * len(ids) + padding, segments + padding


def main() -> None:
    pairs_file, output_file, vocab_file, max_seq_length = sys.argv[1:]
    lines = Path(vocab_file).read_text(encoding="utf-8").split("\n")
    vocabulary = {token: number for number, token in enumerate(lines) if token}
    with open(pairs_file, encoding="utf-8", newline="\n") as handle:
        pairs = [line.rstrip("\n").split("\t") for line in handle]
    rows = [(example_id, label[0] if label else "0", *features(query, passage, vocabulary, int(max_seq_length)))
            for example_id, query, passage, *label in pairs]
    with open(output_file, "w", encoding="utf-8") as handle:
        for example_id, label, *arrays in rows:
            handle.write(",".join([example_id, label, *(str(number) for array in arrays for number in array)]) + "\n")


if __name__ == "__main__":
    main()
