"""Pre-train a small BERT from scratch: learn a WordPiece vocabulary, then train on BERT's two tasks.

    python -m examples.maintenance.pretrain --corpus example_data/corpus.txt example_data/queries.train.tsv \\
        --output_dir teacher_start --num_hidden_layers 4 --hidden_size 128
    python -m examples.maintenance.pretrain --corpus example_data/corpus.txt example_data/queries.train.tsv \\
        --output_dir general_student --num_hidden_layers 2 --layers_of teacher_start --learning_rate 5e-4

In: text files, one passage per line. From tab-separated files (*.tsv), the last column is used.
Out: config.json, model.safetensors (bert.* with pooler, without a task head), vocab.txt and tokenizer_config.json.

A training pair is [CLS] span [SEP] line [SEP], where the span has 8 to 20 tokens. In half of the pairs the line is the
one that the span was cut from, the same line without the span, or the next line. In the other half it is a random line.
The tasks are masked language modelling and next sentence prediction: do span and line belong together?

The initial weights already match words across the two segments (initialise_matching; equal query and key matrices as in
"mimetic initialization", Trockman and Kolter, 2023). Ordinary random weights need far more pairs to discover matching.
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
from simplified_tinybert.model.precision import warn_if_slow

PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
IGNORED = -100  # label of tokens that are not masked
Pair = tuple[list[int], int, bool]  # tokens, length of the first segment, whether the segments belong together


def read_corpus(paths: list[Path]) -> list[str]:
    lines = [(path, line) for path in paths for line in path.read_text(encoding="utf-8").split("\n")]
    return [line.split("\t")[-1] if path.suffix == ".tsv" else line for path, line in lines if line.strip()]


def make_tokenizer(lines: list[str], vocab_file: Path | None, vocab_size: int) -> BertWordPieceTokenizer:
    if vocab_file:
        return BertWordPieceTokenizer(str(vocab_file), lowercase=True)
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(lines, vocab_size=vocab_size, min_frequency=3, limit_alphabet=100,
                                  special_tokens=SPECIAL, show_progress=False)
    tokens = SPECIAL + sorted(set(tokenizer.get_vocab()) - set(SPECIAL))  # the trainer's order is random
    return BertWordPieceTokenizer({token: number for number, token in enumerate(tokens)}, lowercase=True)


def make_pair(line: list[int], next_line: list[int], other: list[int], generator: random.Random, limit: int) -> Pair:
    length = min(generator.randint(8, 20), max(1, len(line) // 2))
    start = generator.randint(0, len(line) - length)
    first, together = [CLS, *line[start:start + length], SEP], generator.random() < 0.5
    second = generator.choice([line, line[:start] + line[start + length:], next_line]) if together else other
    return first + second[:limit - len(first) - 1] + [SEP], len(first), together


def make_batch(pairs: list[Pair], vocab_size: int, generator: np.random.Generator) -> list[Tensor]:
    """Return ids, segments, attention mask, labels of the tokens, and whether the segments belong together.

    Of the chosen 15 % of the tokens, 80 % become [MASK], 10 % become a random token, and 10 % stay. Lengths are rounded
    up to multiples of 16, because each new shape has a set-up cost.
    """
    longest = -(-max(len(tokens) for tokens, _, _ in pairs) // 16) * 16
    ids = np.array([tokens + [PAD] * (longest - len(tokens)) for tokens, _, _ in pairs])
    positions = np.arange(longest)
    segments = np.array([(first <= positions) & (positions < len(tokens)) for tokens, first, _ in pairs], np.int64)
    chosen = (generator.random(ids.shape) < 0.15) & (ids > MASK)
    dice = generator.random(ids.shape)
    masked = np.where(chosen & (dice < 0.8), MASK, ids)
    masked = np.where(chosen & (dice >= 0.9), generator.integers(len(SPECIAL), vocab_size, ids.shape), masked)
    together = np.array([int(together) for _, _, together in pairs])
    arrays = masked, segments, (ids != PAD).astype(np.int64), np.where(chosen, ids, IGNORED), together
    return [torch.from_numpy(array) for array in arrays]


def losses(model: BertForPreTraining, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the losses of masked language modelling and next sentence prediction."""
    ids, segments, attention, labels, together = batch
    states, pooled = model.bert(ids, token_type_ids=segments, attention_mask=attention)[:2]
    chosen = labels != IGNORED
    return (cross_entropy(model.cls.predictions(states[chosen]).float(), labels[chosen]),
            cross_entropy(model.cls.seq_relationship(pooled).float(), together))


def make_batches(lines: list[list[int]], vocab_size: int, args: argparse.Namespace,
                 epoch: int) -> Iterator[list[Tensor]]:
    """Yield batches with one pair per line. Pairs of similar length share a batch; batches are in random order."""
    generator, array_generator = random.Random(args.seed + epoch), np.random.default_rng(args.seed + epoch)
    pairs = [make_pair(line, next_line, generator.choice(lines), generator, args.max_seq_length)
             for line, next_line in zip(lines, lines[1:] + lines[:1])]
    pairs.sort(key=lambda pair: len(pair[0]) + generator.random())
    batches = [pairs[start:start + args.train_batch_size] for start in range(0, len(pairs), args.train_batch_size)]
    generator.shuffle(batches)
    return (make_batch(batch, vocab_size, array_generator) for batch in batches)


def initialise_matching(model: BertForPreTraining, match: float = 8.0, prefer: float = 1.0, read: float = 4.0,
                        std: float = 0.06) -> None:
    """Initialise the middle layer to match words across the segments, and later layers to read the result.

    Segment embeddings are opposite vectors +s and -s; position embeddings are small. In the middle layer, query and key
    matrices are equal except for the sign along s. So a token attends to equal tokens (`match` is added to their
    scores), and prefers the other segment (`prefer`). If a query token also occurs in the passage, it takes over the
    passage's segment vector. In later layers, half of the heads attend to the first segment (`read`) and can see this.
    """
    config, embeddings = model.config, model.bert.embeddings
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    segment = torch.randn(width) * config.initializer_range
    embeddings.token_type_embeddings.weight.data.copy_(torch.stack([segment, -segment]))
    embeddings.position_embeddings.weight.data.mul_(0.25)
    side = segment / segment.norm()
    # After the layer norm, the squared length of a vector is `width`; words and segments contribute about half each
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
                        attention_probs_dropout_prob=0.0)  # with few epochs, dropout only slows learning
    model = BertForPreTraining(config)
    with torch.no_grad():
        initialise_matching(model)
    if args.layers_of:
        take_layers(model, args.layers_of)
    return model


def take_layers(model: BertForPreTraining, directory: Path) -> None:
    """Copy embeddings, pooler and every k-th layer of a deeper model with the same hidden size, as DistilBERT does."""
    weights = load_file(directory / "model.safetensors")
    depth = len({name.split(".")[3] for name in weights if ".layer." in name})
    step = depth // model.config.num_hidden_layers
    sources = {name: re.sub(r"(?<=layer\.)\d+", lambda match: str((int(match[0]) + 1) * step - 1), name)
               for name in model.bert.state_dict()}
    model.bert.load_state_dict({name: weights[f"bert.{source}"].float() for name, source in sources.items()})


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
                mlm_loss, nsp_loss = losses(model, [array.to(device) for array in batch])
            (mlm_loss + nsp_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update()
            means = [0.98 * mean + 0.02 * loss.item() for mean, loss in zip(means, (mlm_loss, nsp_loss))]
            if progress.n % 20 == 0:
                progress.set_postfix_str(f"MLM loss {means[0]:.3f}, NSP loss {means[1]:.3f}", refresh=False)
    progress.close()


def save_model(model: BertForPreTraining, tokenizer: BertWordPieceTokenizer, args: argparse.Namespace) -> None:
    """Save a Hugging Face model directory."""
    directory = args.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    weights = {f"bert.{name}": array.detach().cpu().contiguous()
               for name, array in model.bert.state_dict().items()}
    config = {**model.config.to_diff_dict(), "architectures": ["BertModel"], "dtype": "float32"}
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": args.max_seq_length}
    texts = {"config.json": json.dumps(config, indent=2) + "\n",
             "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
             "vocab.txt": "".join(f"{token}\n" for token, _ in tokens)}
    for name, text in texts.items():
        with atomic_writer(directory / name) as handle:
            handle.write(text)
    with atomic_writer(directory / "model.safetensors", "wb") as handle:
        handle.write(save(weights, metadata={"format": "pt"}))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--corpus", type=Path, nargs="+", required=True, help="text files, one passage per line")
    add("--output_dir", type=Path, required=True, help="directory for the model; created if missing")
    add("--layers_of", type=Path, help="start from every k-th layer of this model, with its vocabulary")
    add("--vocab_size", type=int, default=6000, help="size of the vocabulary to learn")
    add("--num_hidden_layers", type=int, default=4, help="number of layers")
    add("--hidden_size", type=int, default=128, help="hidden size; the feed-forward blocks are four times as large")
    add("--num_attention_heads", type=int, default=4, help="number of attention heads per layer")
    add("--max_seq_length", type=int, default=128, help="tokens of a pair, including special tokens")
    add("--train_batch_size", type=int, default=64, help="pairs per step")
    add("--num_train_epochs", type=int, default=3, help="epochs; each makes a new pair from every line")
    add("--learning_rate", type=float, default=1e-3, help="peak rate, reached after a tenth of the steps")
    add("--seed", type=int, default=42, help="random seed for initial weights, pairs and masks")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.hidden_size % args.num_attention_heads:
        raise UserError(f"--hidden_size {args.hidden_size}: expected a multiple of --num_attention_heads "
                        f"{args.num_attention_heads}")
    warn_if_slow(torch.bfloat16 if args.bf16 else None, torch.device(args.device))
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
