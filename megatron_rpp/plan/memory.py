"""What a plan says: bytes by part on the ranks of each pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.engine.host_copy import BLOCK_BYTES

GIB = 2**30
GRADIENT = 4  # bytes: `grad_reduce_in_fp32`
# Beside torch's tensors: CUDA context, NCCL's buffers, the allocator's fragments. Not computed; a round number.
RESERVE_BYTES = 3 * GIB


@dataclass(frozen=True)
class StageMemory:
    """The fullest rank of one pipeline stage. All sizes are bytes, but for `parameters`."""

    stage: int
    num_layers: int
    parameters: int  # how many this rank holds
    parameter_bytes: int  # with the padding of Megatron's buffers
    copies_bytes: int  # of its matrices in FP8, which Transformer Engine keeps; of the reference's with the reference
    gradient_bytes: int
    optimizer_bytes: int
    reference_bytes: int
    activation_bytes: int  # what autograd keeps of all microbatches in flight
    logits_bytes: int  # those of one microbatch, and what their log-probs and the loss keep; the last stage's
    working_bytes: int  # of the moment: float32 logits of a chunk, a weight's gradient, what is sent to the next stage
    sync_bytes: int
    dropped_copies_bytes: int = 0  # of copies_bytes, what leaves with anything that is off-loaded
    offloaded: tuple[str, ...] = ()  # memory.offload

    @property
    def resident_bytes(self) -> int:
        """What is there all the time, or would be if nothing were off-loaded."""
        parts = self.gradient_bytes + self.optimizer_bytes + self.reference_bytes
        return self.parameter_bytes + self.copies_bytes + parts

    @property
    def sampling_bytes(self) -> int:
        """While servers sample, and in a weight sync."""
        dropped = self.dropped_copies_bytes if self.offloaded else 0
        return self.resident_bytes - self._away("gradients", "optimizer", "reference") - dropped + self.sync_bytes

    @property
    def peak_bytes(self) -> int:
        """The most at once: in a forward-backward pass, in scoring, or in a weight sync."""
        scoring = self.logits_bytes + self.working_bytes - self._away("gradients", "optimizer")
        training = self.activation_bytes + self.logits_bytes + self.working_bytes - self._away("reference")
        return max(self.resident_bytes + max(scoring, training), self.sampling_bytes)

    @property
    def host_bytes(self) -> int:
        """Of page-locked host memory, for what is off-loaded; gradients are dropped."""
        return sum(-(-self._away(name) // BLOCK_BYTES) * BLOCK_BYTES for name in ("optimizer", "reference"))

    def _away(self, *names: str) -> int:
        """Of `names` those that are off-loaded."""
        held = {
            "gradients": self.gradient_bytes,
            "optimizer": self.optimizer_bytes,
            "reference": self.reference_bytes,
        }
        return sum(held[name] for name in names if name in self.offloaded)


@dataclass(frozen=True)
class Servers:
    """The SGLang servers on the trainer's GPUs."""

    weight_bytes: int  # on each GPU of a server
    sleep_while_training: bool  # rollout.release_memory


@dataclass(frozen=True)
class Plan:
    """The layout of a run on `gpus` GPUs, and the memory that it needs."""

    gpus: int
    gpus_per_node: int
    layout: ParallelConfig  # `data` is what `gpus` leaves
    total_parameters: int  # of the whole model
    stages: tuple[StageMemory, ...]
    servers: Servers | None  # None: on GPUs of their own
    warnings: tuple[str, ...] = ()

    @cached_property
    def worst(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.peak_bytes)

    @property
    def host_bytes(self) -> int:
        """Page-locked host memory of a node, if all its ranks are like the worst."""
        return max(stage.host_bytes for stage in self.stages) * min(self.gpus_per_node, self.gpus)

    @property
    def needed_bytes(self) -> int:
        """Of one GPU, for the worst rank and what shares its GPU."""
        alone = max(stage.peak_bytes for stage in self.stages) + RESERVE_BYTES
        return alone if self.servers is None else max(alone, self._beside_servers + self.servers.weight_bytes)

    def fits(self, gpu_bytes: float) -> bool:
        """Whether the run fits GPUs of `gpu_bytes`; servers that share them have room for their weights at least."""
        return self.needed_bytes <= gpu_bytes

    def left_for_kv_cache(self, gpu_bytes: float) -> float:
        """Bytes of a GPU that servers on it may use beside their weights, where the trainer leaves least."""
        assert self.servers is not None
        return gpu_bytes - self._beside_servers - self.servers.weight_bytes

    @property
    def _beside_servers(self) -> int:
        """The trainer's bytes while servers sample."""
        assert self.servers is not None
        sleeps = self.servers.sleep_while_training
        held = max(stage.sampling_bytes if sleeps else stage.peak_bytes for stage in self.stages)
        return held + RESERVE_BYTES
