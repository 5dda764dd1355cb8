"""Pre-train a small BERT from nothing: learn a WordPiece vocabulary, then BERT's two tasks on pairs of texts.

    python -m examples.maintenance.pretrain --corpus example_data/corpus.txt example_data/queries.train.tsv \\
        --output_dir teacher_start --num_hidden_layers 4 --hidden_size 128
    python -m examples.maintenance.pretrain --corpus example_data/corpus.txt example_data/queries.train.tsv \\
        --output_dir general_student --num_hidden_layers 2 --layers_of teacher_start --learning_rate 5e-4

In: text files, one passage a line; of a tab-separated file (*.tsv) the last column.
Out: config.json, model.safetensors (bert.* with pooler; no task's head), vocab.txt and tokenizer_config.json.

A training pair is [CLS] span [SEP] line [SEP]: a span of 8 to 20 tokens, and the line it was cut from, this line
without the span, or the next line (half of the pairs); or any other line (the other half). The model restores masked
pieces (masked language modelling) and tells whether the two belong together (next sentence prediction).

The initial weights already match words across the two segments (start_matching below; equal query and key matrices are
the idea of "mimetic initialization", Trockman and Kolter, 2023). Common random weights take far more pairs to find
matching at all.
"""

import argparse
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import BertConfig, BertForPreTraining

from simplified_tinybert.common.files import UserError, atomic_writer, run_main
from simplified_tinybert.model.precision import warn_if_emulated

PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
IGNORED = -100  # label of the pieces that need not be restored
Pair = tuple[list[int], int, bool]  # pieces, length of the first segment, whether the segments belong together

def read_corpus(paths: list[Path]) -> list[str]:
    lines = [(path, line) for path in paths for line in path.read_text(encoding="utf-8").split("\n")]
    return [line.split("\t")[-1] if path.suffix == ".tsv" else line for path, line in lines if line.strip()]


def make_tokenizer(lines: list[str], vocab_file: Path | None, vocab_size: int) -> BertWordPieceTokenizer:
    if vocab_file:
        return BertWordPieceTokenizer(str(vocab_file), lowercase=True)
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(lines, vocab_size=vocab_size, min_frequency=3, limit_alphabet=100,
                                  special_tokens=SPECIAL, show_progress=False)
    pieces = SPECIAL + sorted(set(tokenizer.get_vocab()) - set(SPECIAL))  # the trainer leaves the order to chance
    return BertWordPieceTokenizer({piece: number for number, piece in enumerate(pieces)}, lowercase=True)


def make_pair(line: list[int], near: list[int], far: list[int], chance: random.Random, limit: int) -> Pair:
    length = min(chance.randint(8, 20), max(1, len(line) // 2))
    start = chance.randint(0, len(line) - length)
    first, together = [CLS, *line[start:start + length], SEP], chance.random() < 0.5
    second = chance.choice([line, line[:start] + line[start + length:], near]) if together else far
    return first + second[:limit - len(first) - 1] + [SEP], len(first), together


def make_batch(pairs: list[Pair], vocab_size: int, random_state: np.random.Generator) -> list[Tensor]:
    """(pieces, segments, attention mask, labels of the pieces, whether the segments belong together).

    Of the chosen 15 % of the pieces 80 % become [MASK], 10 % another piece, 10 % stay. Lengths are multiples of 16,
    because each new shape costs set-up.
    """
    longest = -(-max(len(pieces) for pieces, _, _ in pairs) // 16) * 16
    ids = np.array([pieces + [PAD] * (longest - len(pieces)) for pieces, _, _ in pairs])
    segments = np.array([[int(first <= place < len(pieces)) for place in range(longest)] for pieces, first, _ in pairs])
    chosen = (random_state.random(ids.shape) < 0.15) & (ids > MASK)
    dice = random_state.random(ids.shape)
    masked = np.where(chosen & (dice < 0.8), MASK, ids)
    masked = np.where(chosen & (dice >= 0.9), random_state.integers(len(SPECIAL), vocab_size, ids.shape), masked)
    together = np.array([int(together) for _, _, together in pairs])
    arrays = masked, segments, (ids != PAD).astype(np.int64), np.where(chosen, ids, IGNORED), together
    return [torch.from_numpy(array) for array in arrays]


def losses(model: BertForPreTraining, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(masked language modelling, next sentence): the vocabulary is scored at masked places alone."""
    pieces, segments, attention, labels, together = batch
    states, pooled = model.bert(pieces, token_type_ids=segments, attention_mask=attention)[:2]
    chosen = labels != IGNORED
    return (cross_entropy(model.cls.predictions(states[chosen]).float(), labels[chosen]),
            cross_entropy(model.cls.seq_relationship(pooled).float(), together))


def make_batches(lines: list[list[int]], vocab_size: int, args: argparse.Namespace,
                 epoch: int) -> Iterator[list[Tensor]]:
    """One pair of each line, batches of similar length in random order."""
    chance, random_state = random.Random(args.seed + epoch), np.random.default_rng(args.seed + epoch)
    pairs = [make_pair(line, near, chance.choice(lines), chance, args.max_seq_length)
             for line, near in zip(lines, lines[1:] + lines[:1])]
    pairs.sort(key=lambda pair: len(pair[0]) + chance.random())
    batches = [pairs[start:start + args.train_batch_size] for start in range(0, len(pairs), args.train_batch_size)]
    chance.shuffle(batches)
    return (make_batch(batch, vocab_size, random_state) for batch in batches)


def start_matching(model: BertForPreTraining, match: float = 8.0, prefer: float = 1.0, read: float = 4.0,
                   std: float = 0.06) -> None:
    """Initial weights: the middle layer matches words across the segments, the later ones read the result.

    Segment embeddings are opposite vectors +s and -s, position embeddings small. In the middle layer query and key
    matrices are equal but for the sign along s: a piece attends to its like (score `match` above the rest), rather in
    the other segment (score `prefer`). In later layers half of the heads look at the first segment (score `read` above
    the second), where the query's pieces now carry the other segment's mark if the passage has them too. Training may
    change all of this.
    """
    config, embeddings = model.config, model.bert.embeddings
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    segment = torch.randn(width) * config.initializer_range
    embeddings.token_type_embeddings.weight.data.copy_(torch.stack([segment, -segment]))
    embeddings.position_embeddings.weight.data.mul_(0.25)
    side = segment / segment.norm()
    # After the layer norm words and segments each hold about half of a vector's squared length, which is its width.
    words = torch.randn(width, width) * math.sqrt(2 * match / (math.sqrt(head) * width))
    words -= (words @ side)[:, None] * side
    sides = torch.zeros(width, width)
    sides[::head] = side * math.sqrt(2 * prefer * math.sqrt(head) / width)
    middle = config.num_hidden_layers // 2 - 1
    for index, layer in enumerate(model.bert.encoder.layer):
        query, key = layer.attention.self.query, layer.attention.self.key
        if index == middle:
            query.weight.data.copy_(words + sides)
            key.weight.data.copy_(words - sides)
        if index > middle:
            reading = slice(0, width // 2, head)
            query.bias.data[reading] = 1.0
            key.weight.data[reading] += side * read * math.sqrt(head / width)
        if index >= middle:
            layer.attention.self.value.weight.data.normal_(std=std)
            layer.attention.output.dense.weight.data.normal_(std=std)


def make_model(vocab_size: int, args: argparse.Namespace) -> BertForPreTraining:
    config = BertConfig(vocab_size=vocab_size, hidden_size=args.hidden_size, num_hidden_layers=args.num_hidden_layers,
                        num_attention_heads=args.num_attention_heads, intermediate_size=4 * args.hidden_size,
                        max_position_embeddings=args.max_seq_length, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0)  # few epochs over little text: dropout only slows learning
    model = BertForPreTraining(config)
    with torch.no_grad():
        start_matching(model)
    if args.layers_of:
        take_layers(model, args.layers_of)
    return model


def take_layers(model: BertForPreTraining, directory: Path) -> None:
    """Start as DistilBERT does: embeddings, pooler and every k-th layer of a deeper model of the same width."""
    deep = load_file(directory / "model.safetensors")
    depth = len({name.split(".")[3] for name in deep if ".layer." in name})
    step = depth // model.config.num_hidden_layers
    names = {name: re.sub(r"(?<=layer\.)\d+", lambda match: str((int(match[0]) + 1) * step - 1), name)
             for name in model.bert.state_dict()}
    model.bert.load_state_dict({name: deep[f"bert.{source}"].float() for name, source in names.items()})


def train(model: BertForPreTraining, lines: list[list[int]], args: argparse.Namespace) -> None:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    steps = args.num_train_epochs * -(-len(lines) // args.train_batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.1,
                                                   anneal_strategy="linear", cycle_momentum=False)
    model.train()
    means = [np.log(model.config.vocab_size), np.log(2)]
    progress = tqdm(total=steps, unit="step")
    for epoch in range(args.num_train_epochs):
        for batch in make_batches(lines, model.config.vocab_size, args, epoch):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                restoring, pairing = losses(model, [array.to(device) for array in batch])
            (restoring + pairing).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update()
            means = [0.98 * mean + 0.02 * loss.item() for mean, loss in zip(means, (restoring, pairing))]
            if progress.n % 20 == 0:
                progress.set_postfix_str(f"restoring {means[0]:.3f}, pairing {means[1]:.3f}", refresh=False)
    progress.close()


def save_model(model: BertForPreTraining, tokenizer: BertWordPieceTokenizer, args: argparse.Namespace) -> None:
    """A normal Hugging Face directory."""
    directory = args.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    weights = {f"bert.{name}": array.detach().cpu().contiguous()
               for name, array in model.bert.state_dict().items()}
    config = {**model.config.to_diff_dict(), "architectures": ["BertModel"], "dtype": "float32"}
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": args.max_seq_length}
    texts = {"config.json": json.dumps(config, indent=2) + "\n",
             "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
             "vocab.txt": "".join(f"{piece}\n" for piece, _ in pieces)}
    for name, text in texts.items():
        with atomic_writer(directory / name) as handle:
            handle.write(text)
    with atomic_writer(directory / "model.safetensors", "wb") as handle:
        handle.write(save(weights, metadata={"format": "pt"}))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--corpus", type=Path, nargs="+", required=True, help="text files, one passage a line")
    add("--output_dir", type=Path, required=True, help="directory for the model; made if it is missing")
    add("--layers_of", type=Path, help="start from every k-th layer of this model, with its vocabulary")
    add("--vocab_size", type=int, default=6000, help="tokens to learn")
    add("--num_hidden_layers", type=int, default=4, help="layers")
    add("--hidden_size", type=int, default=128, help="width; the feed-forward blocks are four times as wide")
    add("--num_attention_heads", type=int, default=4, help="heads of each layer")
    add("--max_seq_length", type=int, default=128, help="tokens of a pair, control pieces included")
    add("--train_batch_size", type=int, default=64, help="pairs per step")
    add("--num_train_epochs", type=int, default=3, help="each makes one new pair of each line")
    add("--learning_rate", type=float, default=1e-3, help="highest rate, after a tenth of the steps")
    add("--seed", type=int, default=42, help="of initial weights, pairs and masks")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--bf16", action="store_true", help="compute in bfloat16 where that is safe (autocast)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.hidden_size % args.num_attention_heads:
        raise UserError(f"--hidden_size {args.hidden_size} cannot be shared by {args.num_attention_heads} heads")
    warn_if_emulated(torch.bfloat16 if args.bf16 else None, torch.device(args.device))
    texts = read_corpus(args.corpus)
    tokenizer = make_tokenizer(texts, args.layers_of and args.layers_of / "vocab.txt", args.vocab_size)
    lines = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    lines = [line for line in lines if len(line) >= 8]
    torch.manual_seed(args.seed)
    model = make_model(tokenizer.get_vocab_size(), args).to(args.device)
    weights = model.bert.num_parameters() / 1e6
    print(f"{len(lines)} lines, {sum(map(len, lines))} tokens; {weights:.2f} million weights")
    train(model, lines, args)
    save_model(model, tokenizer, args)


if __name__ == "__main__":
    run_main(main)
