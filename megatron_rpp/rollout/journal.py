"""RUN_DIR/journal: the tokens that were sampled, so that a resumed run need not sample them again.

version-000003.replica-0.jsonl has what replica 0 sampled from policy version 3, a prompt a line, each written as
soon as its last sample is complete. A line is found by what its prompt was asked with: token ids, sampling
parameters and seeds; and it counts only in runs whose weights are made alike (`fingerprint`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.schema import Config
from megatron_rpp.experience.types import Prompt, Rollout, VersionSpan
from megatron_rpp.parallel.context import ParallelContext

logger = logging.getLogger(__name__)

_NAME = re.compile(r"version-(\d+)\.replica-\d+\.jsonl")
_SECTIONS = ("model", "algorithm", "schedule", "reward", "data", "train", "optimizer", "fp8")
_OF_ROLLOUT = ("num_prompts", "max_response_tokens", "context_length", "temperature", "top_p")
_LAYOUT = {
    "train": ("micro_batch_size", "micro_batch_tokens", "logprob_chunk_tokens", "fused_logprobs", "cuda_graphs"),
    "optimizer": ("distributed", "overlap_grad_reduce", "overlap_param_gather"),
}


def journal_folder(run_dir: str | Path) -> Path:
    return Path(run_dir) / "journal"


def fingerprint(config: Config) -> str:
    """Equal for runs whose weights and samples are made alike: not for other data or another learning rate, but for
    other layouts, servers, paths of run.dir and lengths."""
    known: dict[str, Any] = {section: asdict(getattr(config, section)) for section in _SECTIONS}
    for section, keys in _LAYOUT.items():
        for key in keys:
            del known[section][key]
    known["rollout"] = {key: getattr(config.rollout, key) for key in _OF_ROLLOUT}
    known["other"] = [config.run.seed, config.weight_sync.dtype, config.parity.correct]
    return _digest(known)


def request_key(payload: dict[str, Any]) -> str:
    """Of the body of a `/generate` request (rollout/payloads.py)."""
    return _digest(payload)


def open_journal(config: Config, parallel: ParallelContext) -> Journal | None:
    """This rank's; None where it does not sample, or rollout.record and rollout.replay want none.

    Raises ConfigError where rollout.replay is no run with a journal.
    """
    is_wanted = config.rollout.record != "off" or config.rollout.replay
    return Journal(config, parallel.dp_rank) if parallel.is_replica_leader and is_wanted else None


class Journal:
    """One replica's, on its leader; rollout.record says what is kept and rollout.replay which other one is read."""

    def __init__(self, config: Config, replica: int) -> None:
        """Raises ConfigError where rollout.replay is no run with a journal."""
        self._folder, self._replica = journal_folder(config.run.dir), replica
        self._is_recording = config.rollout.record != "off"
        self._run = fingerprint(config)
        self._read_from = [self._folder] if self._is_recording else []
        if replay := config.rollout.replay:
            if not journal_folder(replay).is_dir():
                raise ConfigError(f"rollout.replay={replay} must be the directory of a run with a journal")
            self._read_from.append(journal_folder(replay))
        self._version: int | None = None  # the one that the following are of
        self._lines: dict[str, dict[str, Any]] = {}  # by key
        self._own: set[str] = set()  # keys of lines in our own folder
        self._file: IO[str] | None = None

    def find(self, version: int, key: str, prompt: Prompt, group_id: int) -> list[Rollout] | None:
        """The samples of `prompt` by policy version `version`, where they are known."""
        self._turn_to(version)
        line = self._lines.get(key)
        if line is None:
            return None
        if key not in self._own:  # of another run: what is used is recorded
            self._write(line)
        return [_rollout(sample, prompt, group_id) for sample in line["samples"]]

    def add(self, version: int, key: str, rollouts: Sequence[Rollout]) -> None:
        """Record one prompt's samples, which `version` was asked for; a kill later on does not lose them."""
        self._turn_to(version)
        samples = [_sample(rollout) for rollout in rollouts]
        prompt, group_id = rollouts[0].prompt.id, rollouts[0].group_id
        line = {"key": key, "run": self._run, "prompt": prompt, "group": group_id, "samples": samples}
        self._lines[key] = line
        self._write(line)

    def _turn_to(self, version: int) -> None:
        if version == self._version:
            return
        if self._file is not None:
            self._file.close()
        self._file, self._version, self._lines, self._own = None, version, {}, set()
        others = 0
        for folder in self._read_from:
            for path in sorted(folder.glob(f"version-{version:06d}.replica-*.jsonl")):
                for line in read_lines(path):
                    others += line["run"] != self._run
                    if line["run"] == self._run:
                        self._lines.setdefault(line["key"], line)
                        if folder == self._folder:
                            self._own.add(line["key"])
        if others:
            logger.info("the responses of %d prompts in the journal are of other settings and not used", others)

    def _write(self, line: dict[str, Any]) -> None:
        self._own.add(line["key"])
        if not self._is_recording:
            return
        try:
            if self._file is None:
                self._file = self._open()
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:  # a run that could go on must not end for this
            logger.warning("sampled responses are recorded no more: %s", error)
            self._is_recording = False

    def _open(self) -> IO[str]:
        path = self._folder / f"version-{self._version:06d}.replica-{self._replica}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:  # a killed job may have left half a line at its end
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        return path.open("a", encoding="utf-8")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal file that are whole."""
    with path.open("rb") as file:
        for text in file:
            try:
                line = json.loads(text)
                line["key"], line["run"], line["samples"]
            except (ValueError, KeyError, TypeError):
                logger.info("%s: a line that is not whole is passed over", path)
                continue
            if text.endswith(b"\n"):
                yield line


def forget(run_dir: str | Path, before: int | None = None) -> None:
    """Delete the journal of policy versions below `before`; None: all of it."""
    for path in journal_folder(run_dir).glob("version-*.jsonl"):
        match = _NAME.fullmatch(path.name)
        if match and (before is None or int(match[1]) < before):
            path.unlink(missing_ok=True)


def _sample(rollout: Rollout) -> dict[str, Any]:
    """As JSON, which gives every float back bit by bit. prompt_ids: true where the engine saw the prompt's own."""
    seen = rollout.engine_prompt_ids
    return {
        "ids": rollout.response_ids,
        "logprobs": rollout.rollout_logprobs,
        "text": rollout.text,
        "finish": rollout.finish_reason,
        "spans": rollout.version_spans,
        "prompt_ids": True if seen == rollout.prompt.token_ids else seen,
    }


def _rollout(sample: dict[str, Any], prompt: Prompt, group_id: int) -> Rollout:
    seen = sample["prompt_ids"]
    return Rollout(
        prompt=prompt,
        group_id=group_id,
        response_ids=tuple(sample["ids"]),
        rollout_logprobs=tuple(sample["logprobs"]),
        text=sample["text"],
        finish_reason=sample["finish"],
        version_spans=tuple(VersionSpan(*span) for span in sample["spans"]),
        engine_prompt_ids=prompt.token_ids if seen is True else seen and tuple(seen),
    )


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
