"""The configuration: one frozen dataclass a section, one docstring a field.

No torch here: `rpp --help` and validation answer before anything heavy is imported.
The string under each field is its documentation; `rpp train --help` prints it.
Defaults are the paper's Table 1 (arXiv 2501.03262) where it names a value.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rpp.config.algorithm import AlgorithmConfig
from megatron_rpp.config.data import DataConfig, EvalConfig
from megatron_rpp.config.job import CheckpointConfig, SlurmConfig, WatchdogConfig
from megatron_rpp.config.performance import Fp8Config, MemoryConfig, ProfileConfig
from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.config.rollout import RolloutConfig, ScheduleConfig


@dataclass(frozen=True)
class RunConfig:
    """Where the run writes, and how long it is."""

    dir: str = "runs/default"
    """Run directory: resolved config, metrics, rollouts, logs and checkpoints."""
    seed: int = 0
    """Seeds the prompt order, the sampling and every random-number generator."""
    steps: int = 98
    """Rollout batches to train on. 98 x 256 prompts is the paper's 25,000 samples."""


@dataclass(frozen=True)
class ModelConfig:
    """The policy; the reference is a frozen copy of it."""

    path: str = ""
    """Directory that the policy starts from: Hugging Face (config.json, safetensors, tokenizer) or converted."""
    dtype: str = "float32"
    """Parameter and activation type: float32 or bfloat16."""
    layer_spec: str = "auto"
    """Megatron layer spec: te (Transformer Engine), local, or auto (te where it and CUDA exist)."""
    vocab_divisor: int = 1
    """The vocabulary is padded to a multiple of this times parallel.tensor (64 or 128 suits GPUs)."""
    allow_pickle: bool = False
    """Read pytorch_model.bin, which is a pickle, where the directory has no safetensors (weights alone are built)."""
    mtp: str = "keep"
    """Multi-token prediction layers, never trained: keep (exports take them from a Hugging Face `path`) or drop."""
    trust_remote_code: bool = False
    """Run Python files of the directory, where its tokenizer is written in them."""


@dataclass(frozen=True)
class ParallelConfig:
    """How many ranks share the model; tensor x pipeline x context x data is the job's world size."""

    tensor: int = 1
    """Tensor-parallel size (TP)."""
    pipeline: int = 1
    """Pipeline-parallel size (PP)."""
    virtual_pipeline: int = 1
    """Model chunks on each pipeline stage (interleaved schedule); 1 turns it off."""
    first_stage_layers: int = 0
    """Layers on the first pipeline stage, which also embeds; 0: as many as on the others."""
    last_stage_layers: int = 0
    """Layers on the last pipeline stage, which also computes logits; 0: as many as on the others."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals split over the TP ranks. Needs tensor > 1."""
    context: int = 1
    """Context-parallel size (CP): ranks that share the tokens of a sequence. Needs train.micro_batch_tokens."""
    data: int = 1
    """Data-parallel size (DP): replicas of the model, each with its own prompts."""
    expert: int = 1
    """Expert-parallel size (EP): experts are spread over that many of the tensor x context x data ranks."""
    expert_tensor: int = 1
    """Tensor-parallel size within an expert."""

    @property
    def world_size(self) -> int:
        """Ranks of the trainer."""
        return self.tensor * self.pipeline * self.context * self.data


@dataclass(frozen=True)
class TrainConfig:
    """Optimizer steps on one rollout batch."""

    batch_size: int = 128
    """Responses in one optimizer step, over all replicas (the paper's train batch)."""
    micro_batch_size: int = 8
    """Responses in one forward-backward pass of one replica, padded to the longest, where micro_batch_tokens is 0."""
    micro_batch_tokens: int = 0
    """Tokens in one forward-backward pass of one replica, packed without padding and balanced over replicas; 0: off."""
    logprob_chunk_tokens: int = 64
    """Tokens whose float32 logits exist at once while log-probs are computed, where they are not fused."""
    fused_logprobs: str = "auto"
    """Log-probs compiled into one kernel a pass, without float32 logits in memory: on, off, or auto (on GPUs)."""
    cuda_graphs: bool = False
    """Replay each layer as a CUDA graph: rows are padded to rollout.context_length, so best for short sequences."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with decoupled weight decay, in Megatron-Core."""

    lr: float = 5e-7
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    lr_schedule: str = "constant"
    """constant, linear or cosine decay from lr to min_lr over the whole run."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up; at a high rate Adam's first steps can wreck a policy without it."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """Adam's first-moment decay."""
    adam_beta2: float = 0.95
    """Adam's second-moment decay."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Global gradient-norm limit; 0 turns clipping off."""
    distributed: bool = True
    """Split the optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Sum gradients over replicas bucket by bucket while the backward goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights from replicas bucket by bucket while the next forward goes on."""


@dataclass(frozen=True)
class WeightSyncConfig:
    """How trained weights reach the servers."""

    transports: tuple[str, ...] = ("broadcast", "disk")
    """Tried in this order until a sync is verified: broadcast, disk, ipc (servers on the trainer's GPUs), delta."""
    dtype: str = "auto"
    """Of servers' weights: float32, bfloat16, float8 (128 x 128), or auto: as trained; attached ones model.dtype."""
    bucket_mb: int = 256
    """Unit of memory, in MiB: gathering and sending together hold at most two of these beside the model."""
    deadline_s: float = 300.0
    """Each phase of a sync (begin, send, commit, verify, release) must end within this time."""
    verify: str = "full"
    """Tensors whose checksums are compared at every sync: full (all), sample (an eighth of the layers) or off."""
    unverified: tuple[str, ...] = ()
    """Server tensors with any of these in their names are left out of the comparison."""
    pause: str = "drain"
    """What a sync does with running requests: drain (await them), abort, or retract (they go on with new weights)."""
    disk_path: str = ""
    """Folder that the disk transport writes anew at each sync; empty: weights in run.dir."""
    disk_path_on_servers: str = ""
    """The same folder as the servers see it; empty: as the trainer does."""
    delta_full_every: int = 20
    """Every so many syncs delta sends all weights, as broadcast does."""


@dataclass(frozen=True)
class ParityConfig:
    """Trainer against engine: thresholds for the mean absolute difference of sampled tokens' log-probs in a step."""

    warn: float = 0.05
    """Above it the cause is looked for and logged; 0: never."""
    correct: float = 0.0
    """Above it the step's loss uses truncated importance weights; 0: never."""
    stop: float = 0.5
    """Above it the run ends, with the cause; 0: never."""
    responses: int = 8
    """Responses that the search for a cause scores again, over all replicas; at least one of each."""


@dataclass(frozen=True)
class SftConfig:
    """Supervised warm start (`rpp sft`)."""

    init: str = ""
    """Hugging Face directory to start from."""
    data: str = ""
    """JSONL file of demonstrations: the keys that data.prompt_template names, and `response` (or `answer`)."""
    output: str = ""
    """Hugging Face directory that is written; usually the model.path of `rpp train`."""
    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 128
    """Demonstrations in one optimizer step, over all replicas."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    lr_schedule: str = "linear"
    """constant, linear or cosine."""
    warmup_steps: int = 20
    """Optimizer steps of linear warm-up."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    sft: SftConfig = field(default_factory=SftConfig)
