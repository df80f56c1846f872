"""Weight sync from a trainer to a real SGLang server on this machine: rate, memory, and bytes of deltas.

    python -m benchmarks.weight_sync [--layers 20] [--vocab 4000] [--bucket-mb 256] [--repeats 7] [--dir FOLDER]

Makes a random Llama (float32, 1024 wide) in a temporary folder and runs, on CPU over gloo:

- speed: one trainer rank with one server, with two, and with one of TP 2. In turns: a plain gloo broadcast of the
  same bytes in the same buffers between as many fresh processes, a plain `tensor.copy_`, a sync with
  weight_sync.verify=off, and one with full.
- memory: how far the resident set of a trainer rank rises in a sync (VmHWM) above its level just before, with one
  rank and with two (TP 2), in units of weight_sync.bucket_mb. The bound is 2.
- delta: bytes of weight_sync.transports=delta over those of a full sync, after real optimizer steps on a smaller
  model; every sync is verified bit for bit (verify=full).

The last line is one JSON object. broadcast_over_raw: rate of the send part with verify=off over the plain broadcast's;
verified_send_over_raw: the same with verify=full; verified_over_raw: that of the whole sync with verify=full. All are
of medians, with one server; broadcast_over_raw_fastest is of the fastest of each, which a busy machine spoils less.
peak_extra_buckets: the largest that was seen. delta_bytes_fraction: the largest after one step at the paper's learning
rate, with bfloat16 on the server.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rpp.parallel.local_launch import launch_local

Result = dict[str, Any]
WORKER, DELTA = "benchmarks.weight_sync_worker", "benchmarks.weight_sync_delta"
SERVERS = {  # the settings of each part of `speed`
    "one server": [],
    "two servers": ["--rollout.num_servers=2"],
    "one server of TP 2": ["--rollout.server_tensor=2"],
}
DTYPES = ("bfloat16", "float32")  # of the server in the delta part; the trainer's weights are float32


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="weight-sync-") as scratch:
        folder = Path(scratch)
        large, small = folder / "large", folder / "small"
        write_llama(large, vocab=args.vocab, hidden=1024, ffn=2816, layers=args.layers, heads=16)
        write_llama(small, vocab=2048, hidden=256, ffn=512, layers=3, heads=8)
        bucket = f"--weight_sync.bucket_mb={args.bucket_mb}"
        speeds = {
            name: run(WORKER, "speed", str(args.repeats), model=large, settings=[bucket, *settings])
            for name, settings in SERVERS.items()
        }
        all_rates = {name: summarize_speed(speed) for name, speed in speeds.items()}
        for name, speed in speeds.items():
            print_speed(name, speed, all_rates[name])
        rates = all_rates["one server"]
        memory = {tp: measure_memory(large, bucket, tp) for tp in (1, 2)}
        peaks = summarize_memory(memory, args.bucket_mb * 2**20)
        print_memory(peaks, rates["largest_parameter_bytes"], args.bucket_mb)
        deltas = [series for dtype in DTYPES for series in run(DELTA, model=small, settings=delta_settings(dtype))]
        print_deltas(deltas)
    others = {name: ratios(found) for name, found in all_rates.items() if found is not rates}
    fraction = {"delta_bytes_fraction": delta_bytes_fraction(deltas)}
    print(json.dumps({**rates, **peaks, **others, **fraction, "deltas": deltas}))


def write_llama(
    folder: Path, *, vocab: int, hidden: int, ffn: int, layers: int, heads: int, positions: int = 256
) -> None:
    """A random Llama in float32, weights of deviation 0.02."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        initializer_range=0.02,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def run(module: str, *words: str, model: Path, settings: Sequence[str], ranks: int = 1) -> Any:
    """What a job of `ranks` trainer ranks finds out; ends this process where the job fails."""
    run_dir = model.parent / "-".join(
        ("run", module.rpartition(".")[2], *words, str(len(list(model.parent.iterdir()))))
    )
    out = run_dir / "result.json"
    places = [f"--run.dir={run_dir}", f"--model.path={model}"]
    sizes = ["--rollout.context_length=64", "--rollout.max_response_tokens=8", "--rollout.max_total_tokens=256"]
    task = [words[0], str(out), *words[1:]] if words else [str(out)]
    code = launch_local([sys.executable, "-m", module, *task, *places, *sizes, *settings], ranks, run_dir)
    if code:
        sys.exit(code)
    return json.loads(out.read_text())


def delta_settings(dtype: str) -> list[str]:
    """A server in `dtype`, trained without a reference, never sent everything but once."""
    return [
        "--weight_sync.transports=delta",
        f"--weight_sync.dtype={dtype}",
        "--weight_sync.delta_full_every=1000",
        "--algorithm.kl_coef=0",
        "--train.micro_batch_size=32",
    ]


def summarize_speed(speed: Result) -> dict[str, float]:
    """Medians in seconds, and ratios of rates to the plain broadcast's."""
    syncs = speed["syncs"]
    raw, copy = (statistics.median(speed["plain"][name]) for name in ("broadcast", "copy"))
    send, whole, verified_send, verified = (
        statistics.median(report[key] for report in syncs[verify])
        for verify, key in (("off", "send_s"), ("off", "wall_s"), ("full", "send_s"), ("full", "wall_s"))
    )
    return {
        "bytes": speed["bytes"],
        "largest_parameter_bytes": speed["largest_parameter"],
        "raw_broadcast_s": raw,
        "copy_s": copy,
        "send_s": send,
        "sync_s": whole,
        "verified_send_s": verified_send,
        "verified_sync_s": verified,
        "broadcast_over_raw": raw / send,
        "broadcast_over_raw_fastest": min(speed["plain"]["broadcast"]) / min(r["send_s"] for r in syncs["off"]),
        "verified_send_over_raw": raw / verified_send,
        "unverified_sync_over_raw": raw / whole,
        "verified_over_raw": raw / verified,
    }


def measure_memory(model: Path, bucket: str, tp: int) -> Result:
    return run(WORKER, "memory", "3", model=model, settings=[bucket, f"--parallel.tensor={tp}"], ranks=tp)


def summarize_memory(memory: Mapping[int, Result], bucket_bytes: int) -> dict[str, float]:
    """Largest rise of any rank's resident set in a verified sync, in buckets."""
    found = {f"peak_tp{tp}_buckets": max(result["peak_bytes"]) / bucket_bytes for tp, result in memory.items()}
    return {**found, "peak_extra_buckets": max(found.values())}


def delta_bytes_fraction(deltas: Sequence[Result]) -> float:
    """The worst of one optimizer step at the paper's learning rate, with bfloat16 on the server."""
    wanted = ("paper, one step", "bfloat16")
    return max(share for found in deltas if (found["series"], found["dtype"]) == wanted for share in found["fractions"])


def ratios(rates: Mapping[str, float]) -> dict[str, float]:
    """Those to the plain broadcast alone."""
    return {name: value for name, value in rates.items() if "over_raw" in name}


def print_speed(servers: str, speed: Result, rates: Mapping[str, float]) -> None:
    size = rates["bytes"] / 1e9
    largest = speed["largest_bucket"] / 2**20
    print(f"{servers}: {size:.2f} GB in {speed['buckets']} buckets, the largest of {largest:.0f} MiB")
    lines = {
        "tensor.copy_": "copy_s",
        "plain gloo broadcast": "raw_broadcast_s",
        "verify=off: send": "send_s",
        "verify=off: whole sync": "sync_s",
        "verify=full: send": "verified_send_s",
        "verify=full: whole sync": "verified_sync_s",
    }
    for name, key in lines.items():
        seconds, ratio = rates[key], rates["raw_broadcast_s"] / rates[key]
        print(
            f"{name:24} {seconds:6.2f} s  {size / seconds:6.2f} GB/s  {ratio:5.2f} of the plain broadcast's rate",
            flush=True,
        )


def print_memory(peaks: Mapping[str, float], largest: float, bucket_mb: int) -> None:
    print(f"peak above the level before, in buckets of {bucket_mb} MiB; largest parameter {largest / 2**20:.1f} MiB:")
    for key, name in {"peak_tp1_buckets": "TP 1", "peak_tp2_buckets": "TP 2, the higher rank"}.items():
        print(f"{name:36} {peaks[key]:5.2f}", flush=True)


def print_deltas(deltas: Sequence[Result]) -> None:
    print("bytes of a delta sync over those of a full one, sync by sync (each verified):")
    for found in deltas:
        shares = "  ".join(f"{share:.3f}" for share in found["fractions"])
        if shares:
            print(f"{found['dtype']:9} {found['series']:20} lr up to {max(found['lr']):.1e}: {shares}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20, help="of 47 MB each")
    parser.add_argument("--vocab", type=int, default=4_000, help="rows of the two embeddings, of 4 KiB each")
    parser.add_argument("--bucket-mb", type=int, default=256, help="weight_sync.bucket_mb")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dir", help="where to work (default: the system's temporary folder)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
