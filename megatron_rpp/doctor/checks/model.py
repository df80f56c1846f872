"""Are model and tokenizer on every node, whole, and the same?"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rpp.doctor.finding import Finding, faults, most_common
from megatron_rpp.doctor.job import Job

LIMIT_S = 120.0  # transformers takes its time to import from a cold shared folder
_COPY = "copy the model directory whole to the node, or mount the shared folder that holds it there: {path}"
_SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.distcp")


def measure(path: str, trust_remote_code: bool, allow_pickle: bool) -> dict[str, Any]:
    """{"wrong": {part: why}, "parameters", "digest"} of the model directory as this node sees it."""
    wrong, parameters = {}, 0
    folder = Path(path)
    try:
        parameters = _weights(folder, allow_pickle)
    except (ValueError, OSError) as error:
        wrong["weights"] = str(error)
    try:
        _tokenizer(folder, trust_remote_code)
    except (ValueError, OSError) as error:
        wrong["tokenizer"] = str(error)
    return {"wrong": wrong, "parameters": parameters, "digest": _digest(folder)}


def _weights(folder: Path, allow_pickle: bool) -> int:
    """How many numbers the files hold, by their headers. Raises ValueError where one is missing or cut."""
    from megatron_rpp.model.hf_io.weight_files import open_tensors

    if (folder / ".metadata").is_file() and (folder / "metadata.json").is_file():
        from megatron_rpp.model.load_megatron import read_metadata  # imports megatron

        stored = read_metadata(folder).state_dict_metadata.items()
        sizes = [each.size for name, each in stored if hasattr(each, "size") and "optimizer" not in name]
        return sum(math.prod(size) for size in sizes)
    files = open_tensors(folder, allow_pickle)
    return sum(math.prod(file.tensors[name].shape) for name, file in files.items())


def _tokenizer(folder: Path, trust_remote_code: bool) -> None:
    from megatron_rpp.data.tokenizer import check_vocabulary, load_tokenizer
    from megatron_rpp.model.hf_mapping import read_hf_config

    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    check_vocabulary(tokenizer, read_hf_config(str(folder)).vocab_size, folder)


def _digest(folder: Path) -> str:
    """Of the small files' contents and the sizes of the large ones."""
    digest = hashlib.sha256()
    for path in (folder / name for name in _SMALL):
        if path.is_file():
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    for path in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()


def check(job: Job) -> list[Finding]:
    """On every node: servers load it too. Leaves the number of parameters for the check of disks."""
    path, model = str(Path(job.config.model.path).absolute()), job.config.model
    about = {"path": path, "trust_remote_code": model.trust_remote_code, "allow_pickle": model.allow_pickle}
    answers = job.ask("model", "model.measure", job.nodes, LIMIT_S, **about)
    job.parameters = max((int(answer["parameters"]) for answer in answers.values()), default=0)
    return judge(answers, path)


def judge(answers: Mapping[str, Mapping[str, Any]], path: str) -> list[Finding]:
    findings = []
    for part in ("weights", "tokenizer"):
        wrong = {node: f"{part}: {a['wrong'][part]}" for node, a in answers.items() if part in a["wrong"]}
        findings += faults("model", wrong, answers, _COPY.format(path=path))
    whole = {node: str(answer["digest"]) for node, answer in answers.items() if not answer["wrong"]}
    if whole:
        usual = most_common(whole)
        other = {node: f"{path} holds other files than on the other nodes" for node, d in whole.items() if d != usual}
        findings += faults("model", other, answers, _COPY.format(path=path))
    parameters = max((int(answer["parameters"]) for answer in answers.values()), default=0)
    words = f"weights ({parameters:,} parameters) and tokenizer load on every node"
    return findings or [Finding("model", "ok", words)]
