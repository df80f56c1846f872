"""Writes what the CPU demo starts from: a small random Llama, a character tokenizer, sums to learn.

    python examples/make_demo.py --out runs/demo/start

    OUT/init/                  Hugging Face directory: config, random weights, tokenizer
    OUT/demonstrations.jsonl   sums for the warm start, half of them wrong on purpose
    OUT/train.jsonl            sums to practise on
    OUT/eval.jsonl             sums that neither of the two holds

A wrong demonstration is off by 1, 2 or 10. A model trained on them knows how to add but does not
always say so, which leaves reinforcement learning something to do. The same seed writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHARACTERS = "0123456789+-*= "
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
MISTAKES = (-10, -2, -1, 1, 2, 10)
LOWEST, HIGHEST = 10, 99

Sum = tuple[int, int]


def main() -> None:
    args = _arguments()
    out = Path(args.out)
    (out / "init").mkdir(parents=True, exist_ok=True)
    write_tokenizer(out / "init")
    write_model(out / "init", args)
    rng = random.Random(args.seed)
    train, held_out = split_sums(rng, args.eval_size)
    demonstrations = make_demonstrations(rng, train, args.demonstrations, args.wrong_fraction)
    write_jsonl(out / "demonstrations.jsonl", demonstrations)
    write_jsonl(out / "train.jsonl", (problem(pair) for pair in train))
    write_jsonl(out / "eval.jsonl", (problem(pair) for pair in held_out))
    print(f"{out}: init/, {args.demonstrations} demonstrations, {len(train)} train, {len(held_out)} eval")


def split_sums(rng: random.Random, eval_size: int) -> tuple[list[Sum], list[Sum]]:
    """All sums of two two-digit numbers, shuffled: (those to train on, those held out)."""
    sums = [(a, b) for a in range(LOWEST, HIGHEST + 1) for b in range(LOWEST, HIGHEST + 1)]
    rng.shuffle(sums)
    return sums[eval_size:], sums[:eval_size]


def make_demonstrations(
    rng: random.Random, sums: list[Sum], count: int, wrong_fraction: float
) -> Iterable[dict[str, Any]]:
    """`count` answered sums; a share `wrong_fraction` of the answers, on average, is wrong."""
    for _ in range(count):
        a, b = rng.choice(sums)
        mistake = rng.choice(MISTAKES) if rng.random() < wrong_fraction else 0
        yield {"expression": f"{a} + {b}", "response": str(a + b + mistake)}


def problem(pair: Sum) -> dict[str, Any]:
    a, b = pair
    return {"expression": f"{a} + {b}", "answer": str(a + b)}


def write_tokenizer(directory: Path) -> None:
    """A fast tokenizer with one token a character; `decode` joins the characters again."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *CHARACTERS, UNKNOWN])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNKNOWN}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=64, **special
    )
    wrapped.save_pretrained(directory)


def write_model(directory: Path, args: argparse.Namespace) -> None:
    """A Llama with random weights."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=64,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, pad_token_id=0, eos_token_id=1)
    model.save_pretrained(directory)


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--demonstrations", type=int, default=100_000, help="how many to write")
    parser.add_argument("--wrong-fraction", type=float, default=0.5, help="share of wrong demonstrations")
    parser.add_argument("--eval-size", type=int, default=512, help="sums held out for evaluation")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=32, help="18 are used; the rest is padding")
    args = parser.parse_args()
    if not 0 <= args.wrong_fraction <= 1:
        raise SystemExit(f"--wrong-fraction {args.wrong_fraction} must be between 0 and 1")
    sums = (HIGHEST - LOWEST + 1) ** 2
    if not 0 < args.eval_size < sums:
        raise SystemExit(f"--eval-size {args.eval_size} must be between 1 and {sums - 1}")
    return args


if __name__ == "__main__":
    main()
