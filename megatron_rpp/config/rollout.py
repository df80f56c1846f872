"""The sections `rollout` and `schedule`: how responses are sampled, and when a step has enough of them."""

from __future__ import annotations

from dataclasses import dataclass

MOST_ROUNDS = 3
"""Times that a step draws prompts, where dynamic sampling leaves out all that it has drawn before."""


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling by SGLang."""

    num_prompts: int = 256
    """Prompts sampled in one step, over all data-parallel replicas (the paper's rollout batch)."""
    max_response_tokens: int = 1024
    """Longest response; a longer one is truncated and counted as such."""
    context_length: int = 2048
    """Longest prompt plus response, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; log-probs everywhere are those of the tempered distribution."""
    top_p: float = 1.0
    """Nucleus sampling; below 1 the engine samples from less than the distribution that it gives log-probs of."""
    urls: tuple[str, ...] = ()
    """Running SGLang servers to attach to; without this, urls_file and registry the trainer spawns its own."""
    urls_file: str = ""
    """File with the URL of a running server on each line, read again before every step: servers join and leave."""
    registry: bool = False
    """Servers announce themselves in the job's store (`rpp serve`), on any host; they join and leave."""
    num_servers: int = 1
    """Servers that the trainer spawns, each with its own tensor-parallel ranks; of a registry, those it starts with."""
    port: int = 0
    """Port of the first spawned server on loopback, the next ones follow; 0 takes free ones."""
    server_tensor: int = 1
    """Tensor-parallel size of each spawned server; attached ones say theirs themselves."""
    server_args: tuple[str, ...] = ()
    """More arguments for `sglang.launch_server`, as on its command line."""
    max_total_tokens: int = 20_000
    """KV-cache size of a spawned server, in tokens, if context_length is not larger (CPU only)."""
    release_memory: bool = False
    """Servers share the trainer's GPUs: they give their memory back while the trainer computes."""
    startup_deadline_s: float = 300.0
    """A server must be healthy within this time; a run that has none waits max_retries + 1 times as long for one."""
    health_deadline_s: float = 60.0
    """A server without a sign of life for so long is taken for dead, and its requests go to others."""
    restart_backoff_s: float = 1.0
    """Wait before a dead server is started again, or one that no sync has brought is tried; doubles, see the docs."""
    request_deadline_s: float = 600.0
    """One step's sampling must end within this time."""
    max_concurrent_requests: int = 64
    """Requests that each replica has in flight at once; a request holds the samples of one prompt."""
    max_retries: int = 3
    """Times that a failed request is sent again, and that a failed weight sync or step's sampling is repeated."""
    record: str = "resume"
    """Sampled tokens kept in the run directory: resume (what a resumed run would sample again), all, or off."""
    replay: str = ""
    """Run directory whose recorded responses are used instead of sampling, where it has them."""

    @property
    def spawns_servers(self) -> bool:
        """Whether the trainer starts its servers itself, rather than attach to running ones."""
        return not (self.urls or self.urls_file or self.registry)


@dataclass(frozen=True)
class ScheduleConfig:
    """When a step has enough responses. By default it waits for every response to its num_prompts prompts."""

    over_sampling: float = 1.0
    """Ask this many times rollout.num_prompts, take the groups that are complete first, abort the rest; 1: off."""
    max_deferrals: int = 2
    """Times that a prompt may be put off because its group was aborted; then the step waits for it. 0: none ever is."""
    dynamic_sampling: bool = False
    """Leave out groups whose responses all earn the same reward, and sample others in their place (DAPO)."""
    max_draws: float = 4.0
    """Dynamic sampling draws at most this many times rollout.num_prompts in a step, and goes on with what it has."""
    time_budget_s: float = 0.0
    """Sampling ends after this time, with train.batch_size responses and all that it must await; 0: no limit."""
    token_budget: int = 0
    """Sampling ends, as with time_budget_s, once complete groups have so many response tokens; 0: no limit."""

    @property
    def is_plain(self) -> bool:
        """Every step trains on exactly the next num_prompts prompts, whatever they earn and however long they take."""
        return self.over_sampling == 1.0 and not (self.dynamic_sampling or self.time_budget_s or self.token_budget)
