"""The shape of a model, under our own names, as a Hugging Face config.json tells it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_rpp.config.errors import ConfigError

_ROPE_ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ROPE_OPTIONAL = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "attn_factor", "truncate"}
_ROPE_KEYS = {  # what each kind of scaling cannot be computed without
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer."""

    theta: float
    fraction: float = 1.0  # of each head's dimensions that is rotated, from the first on
    interleaved: bool = False  # pairs are (0, 1), (2, 3), ... and not (0, D/2), (1, D/2 + 1), ...
    scaling: Mapping[str, Any] | None = None  # transformers' rope_parameters, where rope_type is not `default`


@dataclass(frozen=True)
class MoE:
    """Mixture of experts. Layers outside `layers` have a dense MLP of ffn_hidden_size."""

    num_experts: int
    top_k: int
    ffn_hidden_size: int  # of one expert
    layers: tuple[bool, ...]  # [num_layers]: which ones have experts
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize_top_k: bool = True  # the chosen experts' weights sum to 1, before `scale`
    scale: float = 1.0
    num_groups: int = 1  # of experts; the router first chooses top_groups of them
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "top2_sum"
    selection_bias: bool = False  # added to scores to choose experts, not to weigh them (arXiv 2408.15664)
    shared_ffn_hidden_size: int = 0  # of the expert that every token passes; 0: there is none


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (arXiv 2405.04434): dimensions of its low-rank projections and of a head."""

    q_lora_rank: int | None  # None: queries are projected directly
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class HFConfig:
    """A decoder-only model. The defaults are Llama's."""

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope: Rope
    max_position_embeddings: int
    tied_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    zero_centered_norm: bool = False  # the norm multiplies by 1 + weight
    post_norms: bool = False  # attention and MLP are also normalized behind, before the residual sum
    embedding_scale: float = 1.0
    attention_scale: float | None = None  # of q @ k; None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # scores become cap * tanh(score / cap)
    logits_softcap: float | None = None
    sliding_window: int | None = None  # positions, itself included, that a token sees in sliding layers
    sliding_layers: tuple[bool, ...] = ()  # [num_layers] where there is a window: which ones slide
    sliding_rope: Rope | None = None  # of sliding layers; None: as `rope`
    moe: MoE | None = None
    mla: MLA | None = None
    num_mtp_layers: int = 0  # multi-token prediction layers behind the last one
    mtp_copies: tuple[str, ...] = ("embed_tokens.weight", "shared_head.head.weight")  # main tensors that they repeat


def without_values(hf: HFConfig) -> HFConfig:
    """`hf` less what has no weights and is computed as the model is built, which meta tensors cannot."""
    sliding = replace(hf.sliding_rope, scaling=None) if hf.sliding_rope else None
    return replace(hf, rope=replace(hf.rope, scaling=None), sliding_rope=sliding, embedding_scale=1.0)


class RawConfig:
    """A config.json as transformers 4 or 5 wrote it; every complaint names the directory and the key."""

    def __init__(self, path: str, setting: str) -> None:
        """`setting` is what the user set to `path`. Raises ConfigError where there is no JSON object to read."""
        self._where = f"{setting}={path}"
        if not path:
            raise ConfigError(f"{setting} is not set; pass --{setting.removeprefix('--')}=DIRECTORY of a model")
        if not Path(path).is_dir():
            raise ConfigError(f"{self._where} must be an existing directory of a Hugging Face model")
        try:
            values = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{self._where} must hold a readable config.json: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{self._where} must hold a valid config.json: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{self._where} must hold a valid config.json: a JSON object, not {values!r}")
        self._values: dict[str, Any] = values

    @property
    def architecture(self) -> str:
        named = self._values.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else "none named"

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`; `default` where it is absent or null."""
        value = self._values.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number. Raises ConfigError for anything else, and where it is absent without a default."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{key}={value}; it must be a positive whole number")
        return value

    def count(self, key: str, default: int) -> int:
        """A whole number of at least 0. Raises ConfigError for anything else."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(f"{key}={value}; it must be a whole number of at least 0")
        return value

    def number(self, key: str, default: float) -> float:
        """A number above 0. Raises ConfigError for anything else."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self.error(f"{key}={value!r}; it must be a number above 0")
        return float(value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A JSON object, empty where it is absent. Raises ConfigError for anything else."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.error(f"{key}={value!r}; it must be a JSON object")
        return value

    def require(self, key: str, supported: Any, *, default: Any) -> None:
        """Raises ConfigError where `key` is not the one value that this package runs."""
        if (value := self.get(key, default)) != supported:
            raise self.error(f"{key}={value!r}, which is not supported; only {supported!r} is")

    def error(self, what: str) -> ConfigError:
        """`what` is wrong in this config.json."""
        return ConfigError(f"{self._where}: its config.json has {what}")

    def unsupported(self, known: str) -> ConfigError:
        """There is no family of this architecture."""
        return ConfigError(f"{self._where} has architecture {self.architecture}; it must be one of: {known}")


def read_dense(
    raw: RawConfig,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    rope_theta: float = 10_000.0,
    rope_fraction: float | None = None,
) -> HFConfig:
    """What all families write alike. The keywords are what transformers assumes where config.json is silent."""
    heads = raw.size("num_attention_heads")
    hidden = raw.size("hidden_size")
    return HFConfig(
        architecture=raw.architecture,
        num_layers=raw.size("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=raw.size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=raw.size("num_key_value_heads", kv_heads or heads),
        head_dim=raw.size("head_dim", head_dim or hidden // heads),
        vocab_size=raw.size("vocab_size"),
        norm_eps=raw.number("rms_norm_eps", 1e-6),
        rope=read_rope(raw, fraction=rope_fraction, theta=rope_theta),
        max_position_embeddings=raw.size("max_position_embeddings", 2048),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
    )


def with_window(hf: HFConfig, raw: RawConfig, *, default: int | None) -> HFConfig:
    """`hf` with a sliding window in every layer; null in config.json means none, `default` is of an absent key."""
    silent = "sliding_window" not in raw
    if raw.get("sliding_window") is None and not (silent and default):
        return hf
    return replace(hf, sliding_window=raw.size("sliding_window", default), sliding_layers=(True,) * hf.num_layers)


def read_rope(raw: RawConfig, *, fraction: float | None = None, theta: float = 10_000.0) -> Rope:
    """`rope_parameters` of transformers 5, or rope_theta and rope_scaling of transformers 4; with defaults.

    fraction: of a head that is rotated, where config.json does not say; None: it must not say other than 1.
    """
    stated = raw.mapping("rope_parameters") or raw.mapping("rope_scaling")
    base = {"rope_theta": raw.number("rope_theta", theta)}
    values = {**base, "partial_rotary_factor": raw.number("partial_rotary_factor", fraction or 1.0), **stated}
    if fraction is None and values["partial_rotary_factor"] != 1.0:
        raise raw.error(f"partial_rotary_factor={values['partial_rotary_factor']}, which is not supported here")
    return rope_from(raw, values)


def rope_from(raw: RawConfig, values: Mapping[str, Any]) -> Rope:
    """One layer kind's rope_parameters. Raises ConfigError for a scaling that cannot be computed as it is meant."""
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise raw.error(f"rope_type={kind!r}, which is not supported; only {', '.join(_ROPE_KEYS)} are")
    for key in ("rope_theta", "partial_rotary_factor", *_ROPE_KEYS[kind]):
        if not isinstance(values.get(key), int | float):
            raise raw.error(f"{key}={values.get(key)!r} beside rope_type={kind!r}; it must be a number")
    if kind == "default":
        return Rope(float(values["rope_theta"]), float(values["partial_rotary_factor"]))
    known = _ROPE_ALWAYS.union(_ROPE_KEYS[kind], _ROPE_OPTIONAL if kind == "yarn" else ())
    for key in values.keys() - known:
        raise raw.error(f"{key}={values[key]!r} beside rope_type={kind!r}, which is not supported")
    if kind == "yarn" and values["partial_rotary_factor"] != 1.0:
        raise raw.error("rope_type='yarn' with partly rotated heads, which is not supported")
    scaling = {**values, "rope_type": kind}
    return Rope(float(values["rope_theta"]), float(values["partial_rotary_factor"]), scaling=scaling)
