"""One rank of a model that answers token-id prompts greedily, by Megatron's forward pass alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rpp.config.schema import Config, ModelConfig, ParallelConfig, TrainConfig
from megatron_rpp.engine.pipeline import run_pipeline
from megatron_rpp.engine.score import logits_head
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.parallel import bootstrap


def greedy(model: Model, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The most probable continuations; each token costs a forward pass over everything before it."""
    texts = [list(prompt) for prompt in prompts]
    for _ in range(new_tokens):
        width = max(map(len, texts))
        tokens = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        empty = torch.zeros(tokens.shape)
        batch = ExperienceBatch(tokens, empty, empty, empty[:, 0], tokens[:, 0])
        with torch.no_grad():
            found = run_pipeline(
                model, batch, logits_head(model), train=TrainConfig(micro_batch_size=len(texts)), forward_only=True
            )
        for row, text in enumerate(texts):
            text.append(int(found["logits"][row, len(text) - 1].argmax()))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def main() -> None:
    arguments = json.loads(sys.argv[1])
    layout = ParallelConfig(**arguments["layout"])
    config = Config(model=ModelConfig(path=arguments["model"]), parallel=layout)
    model = build_model(config, bootstrap.initialize(layout, seed=0), path=config.model.path)
    answers = greedy(model, arguments["prompts"], arguments["new_tokens"])
    if dist.get_rank() == 0:
        Path(arguments["out"]).write_text(json.dumps(answers))
    bootstrap.shutdown()


if __name__ == "__main__":
    main()
