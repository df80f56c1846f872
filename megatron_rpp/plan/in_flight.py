"""Microbatches whose activations a pipeline stage holds at once, in Megatron's 1F1B schedules."""

from __future__ import annotations

from megatron_rpp.config.schema import ParallelConfig


def chunks_in_flight(parallel: ParallelConfig, stage: int, num_microbatches: int) -> list[int]:
    """How many microbatches each model chunk of `stage` holds at the fullest moment, right after a forward.

    `get_pp_rank_microbatches` and `forward_backward_pipelining_with_interleaving` count the forwards that
    come before a stage's first backward; one more follows (arXiv 2104.04473, figure 4).
    """
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    behind = stages - stage - 1
    if chunks == 1:
        return [min(behind + 1, num_microbatches)]
    rounded = -(-num_microbatches // stages) * stages  # the engine pads to a multiple
    forwards = min(behind * 2 + (chunks - 1) * stages + 1, rounded * chunks)
    held = [0] * chunks
    for k in range(forwards):  # a chunk takes as many microbatches in a row as there are stages
        held[k // stages % chunks] += 1
    return held
