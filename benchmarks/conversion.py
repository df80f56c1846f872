"""Time and peak memory of both checkpoint conversions, against `cp` of the same bytes.

    python -m benchmarks.conversion [--gb 2] [--dir FOLDER] [--repeats 3]

Makes a random Llama checkpoint (bfloat16, 2048 wide) of about --gb 10^9 bytes in a temporary folder, converts
it to Megatron and back, and copies it with `cp -r`. Each runs in a process of its own, with its source in the
page cache, and counts until every byte is on disk (fsync). Where a virtual machine gives free memory back to
its host, the first touch of a page costs more than all the rest; so before each run as many pages as it needs
are touched and freed. Each figure is of the fastest of --repeats. Memory is the process's peak resident set
(VmHWM). At the end, both directories are compared bit for bit.

The last line is one JSON object. seconds: of the whole command, of which startup_seconds go by before the first
byte is written (imports, checks). ratio_to_cp: seconds over those of cp; streaming_ratio_to_cp: without the
startup, as for a large model. peak_over_largest_layer_mb: the peak less the largest layer (a decoder layer or an
embedding), in 10^6 bytes; the bound is 500.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_rpp.model.hf_io.safetensors_writer import Entry, plan_files, write_file, write_index

HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM, VOCAB = 2048, 8192, 16, 8, 128, 32_000
FILE_BYTES = 500_000_000
# Runs a module as __main__, then tells the process's peak resident set in kB.
_RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
_TOUCH = """
import mmap, sys
size = int(sys.argv[1])
memory = mmap.mmap(-1, size)
for page in range(0, size, mmap.PAGESIZE):
    memory[page] = 1
"""


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="conversion-") as scratch:
        folder = Path(scratch)
        source = folder / "hf"
        entries = make_checkpoint(source, args.gb)
        layer = largest_layer(entries)
        copying, copying_cpu = min(copy_seconds(source, folder / "copy") for _ in range(args.repeats))
        there, back = folder / "megatron", folder / "back"
        found = {
            "hf_to_megatron": convert("hf_to_megatron", source, there, args.repeats),
            "megatron_to_hf": convert("megatron_to_hf", there, back, args.repeats),
        }
        same = subprocess.run([sys.executable, "-m", "checkpoint_tools.compare", str(source), str(back)]).returncode
    size = sum(entry.nbytes for entry in entries)
    print(f"{size / 1e9:.2f} GB, largest layer {layer / 1e6:.0f} MB; cp {copying:.1f} s")
    for name, result in found.items():
        result["gb_per_s"] = size / 1e9 / result["seconds"]
        result["ratio_to_cp"] = result["seconds"] / copying
        result["streaming_ratio_to_cp"] = (result["seconds"] - result["startup_seconds"]) / copying
        result["peak_over_largest_layer_mb"] = result["peak_mb"] - layer / 1e6
        print(f"{name}: " + "  ".join(f"{key} {value:.2f}" for key, value in result.items()))
    summary = {
        "gb": size / 1e9,
        "largest_layer_mb": layer / 1e6,
        "cp_seconds": copying,
        "cp_cpu_seconds": copying_cpu,
        "identical": same == 0,
    }
    print(json.dumps({**summary, **found}))


def make_checkpoint(folder: Path, gb: float) -> list[Entry]:
    """Write a Llama of about `gb` 10^9 bytes, one tensor at a time; its entries."""
    outer = [entry("model.embed_tokens", VOCAB, HIDDEN), entry("lm_head", VOCAB, HIDDEN), entry("model.norm", HIDDEN)]
    layer_bytes = sum(e.nbytes for e in layer_entries(0))
    layers = max(1, round((gb * 1e9 - sum(e.nbytes for e in outer)) / layer_bytes))
    entries = [*outer, *(e for i in range(layers) for e in layer_entries(i))]
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    files = plan_files(entries, FILE_BYTES)
    for name, held in files:
        write_file(folder / name, held, _random(held))
    write_index(folder, files)
    return entries


def layer_entries(i: int) -> list[Entry]:
    """The tensors of decoder layer i."""
    prefix, keys = f"model.layers.{i}", GROUPS * HEAD_DIM
    shapes = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    return [entry(f"{prefix}.{name}", *shape) for name, shape in shapes.items()]


def entry(name: str, *shape: int) -> Entry:
    return Entry(f"{name}.weight", torch.bfloat16, shape)


def largest_layer(entries: Sequence[Entry]) -> int:
    """Bytes of the largest decoder layer or embedding."""
    decoder = sum(e.nbytes for e in layer_entries(0))
    return max(decoder, *(e.nbytes for e in entries))


def copy_seconds(source: Path, target: Path) -> tuple[float, float]:
    """Seconds and CPU seconds of `cp -r`, until every file is on disk."""
    _into_page_cache(source)
    started, cpu_started = time.perf_counter(), _cpu_of_children()
    subprocess.run(f"cp -r {source} {target} && sync {target}/*", shell=True, check=True)
    took = (time.perf_counter() - started, _cpu_of_children() - cpu_started)
    shutil.rmtree(target)
    return took


def convert(tool: str, source: Path, target: Path, repeats: int) -> dict[str, float]:
    """The fastest of `repeats` runs, with the largest peak; the last one's output stays."""
    runs = []
    for _ in range(repeats):
        shutil.rmtree(target, ignore_errors=True)
        _into_page_cache(source)
        given = "--hf" if tool == "hf_to_megatron" else "--megatron"
        words = [given, str(source), "--out", str(target)]
        command = [sys.executable, "-c", _RUN, f"checkpoint_tools.{tool}", *words]
        started, cpu_started = time.perf_counter(), _cpu_of_children()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(done.stderr)
        streaming = float(done.stderr.splitlines()[-1].split(" s in all")[0].split()[-1])
        peak_mb = float(done.stdout.splitlines()[-1]) * 1024 / 1e6
        runs.append((seconds, peak_mb, seconds - streaming, _cpu_of_children() - cpu_started))
    fastest = min(runs)
    peak = max(run[1] for run in runs)
    return {"seconds": fastest[0], "cpu_seconds": fastest[3], "startup_seconds": fastest[2], "peak_mb": peak}


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _random(entries: Sequence[Entry]) -> Iterator[tuple[str, Tensor]]:
    for number, held in enumerate(entries):
        generator = torch.Generator().manual_seed(number)
        row = torch.randn(1 << 20, generator=generator).bfloat16()
        count = held.nbytes // 2
        yield held.name, row.repeat(-(-count // row.numel()))[:count].view(held.shape)


def _into_page_cache(folder: Path) -> None:
    """And touch memory for a copy, a model's largest parts and to spare."""
    subprocess.run(f"cat {folder}/* > /dev/null", shell=True, check=True)
    size = sum(file.stat().st_size for file in folder.iterdir())
    subprocess.run([sys.executable, "-c", _TOUCH, str(2 * size + (1 << 30))], check=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--dir", help="where to work (default: the system's temporary folder)")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
