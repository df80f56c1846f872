"""The memory of each pipeline stage, put together from the parts of the model that it holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_rpp import device
from megatron_rpp.config.schema import Config
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.transformer_config import transformer_config
from megatron_rpp.plan.buffers import bucket_elements, lay_out
from megatron_rpp.plan.fp8_weights import fp8_weights
from megatron_rpp.plan.in_flight import chunks_in_flight
from megatron_rpp.plan.memory import GRADIENT, StageMemory
from megatron_rpp.plan.microbatch import largest_microbatch, num_microbatches
from megatron_rpp.plan.parts import Part, Parts, count_parts, kinds_of

MIB = 2**20
_MOMENT = 4  # bytes: each of Adam's two, in float32
_TOKEN_BYTES = 112  # a token's, as measured in the policy loss of the default preset; little beside its logits


def stage_memory(hf: HFConfig, config: Config) -> Iterator[StageMemory]:
    """Of each pipeline stage the fullest rank; config.parallel.data is the real one."""
    parts = count_parts(hf, config)
    for stage, layers in enumerate(layers_of_stages(hf, config)):
        yield _stage(hf, config, parts, stage, layers)


def _stage(hf: HFConfig, config: Config, parts: Parts, stage: int, layers: Sequence[range]) -> StageMemory:
    parallel, size = config.parallel, device.dtype(config.model.dtype).itemsize
    chunks = [_parts_of(hf, config, parts, stage, chunk, held) for chunk, held in enumerate(layers)]
    in_flight = chunks_in_flight(parallel, stage, num_microbatches(config))
    parameters, lengths, updated = _buffers(hf, config, chunks, stage)
    main = 0 if size == 4 else 4  # a float32 copy of each parameter
    fp8 = fp8_weights(config, _matrices(hf, config, parts, layers))
    is_last = stage == parallel.pipeline - 1
    return StageMemory(
        stage=stage,
        num_layers=sum(len(held) for held in layers),
        parameters=parameters,
        parameter_bytes=(lengths if config.optimizer.distributed else parameters) * size - fp8.narrower,
        copies_bytes=fp8.copies,
        gradient_bytes=lengths * GRADIENT,
        optimizer_bytes=updated * (main + 2 * _MOMENT),
        reference_bytes=parameters * size - fp8.narrower + fp8.copies if config.algorithm.uses_reference else 0,
        activation_bytes=sum(n * part.saved for n, chunk in zip(in_flight, chunks, strict=True) for part in chunk),
        logits_bytes=_kept_logits(config, parts, size) if is_last else 0,
        working_bytes=_working(hf, config, parts, chunks, in_flight, is_last=is_last),
        dropped_copies_bytes=0 if config.fp8.params or config.train.cuda_graphs else fp8.copies,
        sync_bytes=2 * config.weight_sync.bucket_mb * MIB,
        offloaded=config.memory.offload,
    )


def layers_of_stages(hf: HFConfig, config: Config) -> list[list[range]]:
    """By stage and model chunk the global indices of the layers, as Megatron shares them out."""
    parallel = config.parallel
    model, train = replace(config.model, layer_spec="local"), replace(config.train, cuda_graphs=False)  # without a GPU
    megatron = transformer_config(hf, replace(config, model=model, train=train))

    def layers(stage: int, chunk: int) -> range:
        vp_stage = chunk if parallel.virtual_pipeline > 1 else None
        first = get_transformer_layer_offset(megatron, vp_stage=vp_stage, pp_rank=stage)
        return range(first, first + get_num_layers_to_build(megatron, vp_stage=vp_stage, pp_rank=stage))

    return [[layers(i, chunk) for chunk in range(parallel.virtual_pipeline)] for i in range(parallel.pipeline)]


def _parts_of(hf: HFConfig, config: Config, parts: Parts, stage: int, chunk: int, layers: range) -> list[Part]:
    """The parts of a model chunk, in the module's order."""
    parallel, kinds = config.parallel, kinds_of(hf)
    held = [parts.layers[kinds[i]] for i in layers]
    if stage == chunk == 0:
        held = [parts.embedding, *held]
    if stage == parallel.pipeline - 1 and chunk == parallel.virtual_pipeline - 1:
        copied = hf.tied_embeddings and parallel.pipeline > 1
        output = replace(parts.output, dense=parts.embedding.dense) if copied else parts.output
        held = [*held, parts.norm, output]
    return held


def _matrices(hf: HFConfig, config: Config, parts: Parts, layers: Sequence[range]) -> int:
    """Elements on a rank of a stage that FP8 computes with: all matrices but those of layers that stay in bfloat16."""
    kinds, fp8 = kinds_of(hf), config.fp8
    narrow = range(fp8.bf16_first_layers, hf.num_layers - fp8.bf16_last_layers)
    return sum(parts.layers[kinds[i]].matrices for held in layers for i in held if i in narrow)


def _buffers(hf: HFConfig, config: Config, chunks: Sequence[Sequence[Part]], stage: int) -> tuple[int, int, int]:
    """(parameters, elements of their buffers, the most that one rank updates) of a stage's ranks.

    Context-parallel ranks, whose weights are the same, share the optimizer out as data-parallel ones do.
    """
    parallel, distributed = config.parallel, config.optimizer.distributed
    copies = parallel.context * parallel.data
    expert_copies = parallel.tensor * copies // (parallel.expert * parallel.expert_tensor)
    parameters = length = updated = 0
    for i, chunk in enumerate(chunks):
        dense = [size for part in chunk for size in part.dense]
        experts = [size for part in chunk for size in part.experts]
        parameters += sum(dense) + sum(experts)
        shared = hf.tied_embeddings and parallel.pipeline > 1
        first, last = stage == i == 0, stage == parallel.pipeline - 1 and i == len(chunks) - 1
        apart = (0 if first else len(dense) - 1 if last else None) if shared else None
        # Megatron sums in parts on the first stage alone, and we of its first chunk alone.
        bucket = bucket_elements(parallel.data) if config.optimizer.overlap_grad_reduce and stage == i == 0 else None
        for sizes, ranks, own in ((dense, copies, apart), (experts, expert_copies, None)):
            buffer = lay_out(sizes, ranks, distributed=distributed, apart=own, bucket=bucket)
            length += buffer.length
            updated += max(buffer.updated)
    return parameters, length, updated


def _kept_logits(config: Config, parts: Parts, size: int) -> int:
    """Of a microbatch, which their gradient will overwrite (parallel/vocab_logprobs.py), with the loss's own."""
    return parts.logits * size + largest_microbatch(config).all_tokens * _TOKEN_BYTES


def _working(
    hf: HFConfig,
    config: Config,
    parts: Parts,
    chunks: Sequence[Sequence[Part]],
    in_flight: Sequence[int],
    *,
    is_last: bool,
) -> int:
    """The larger of log-probs and a weight's gradient; and a stage's outputs, which Megatron's schedules hold beside
    them. A layer that is computed again may take more, but not beside logits, which are gone by then."""
    size = device.dtype(config.model.dtype).itemsize
    gradient = max(n for chunk in chunks for part in chunk for n in (*part.dense, *part.experts)) * size
    tokens = largest_microbatch(config).tokens
    chunk_tokens = min(config.train.logprob_chunk_tokens, tokens)
    logprobs = chunk_tokens * parts.logits // tokens * (8 if hf.logits_softcap is None else 12) if is_last else 0
    handed_on = in_flight[:-1] if is_last else in_flight
    again = gradient + parts.recomputed - (_kept_logits(config, parts, size) if is_last else 0)
    return max(gradient, again, logprobs) + sum(handed_on) * parts.hidden * size
