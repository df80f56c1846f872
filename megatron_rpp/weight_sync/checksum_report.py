"""A server's checksums against the predicted ones, and which of its tensors are checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_rpp.weight_sync.server_layout import made_of

_SAMPLED_SHARE = 8  # of the layers, one in so many is checked
_FUSED_HINT = "; start the server with --disable-shared-experts-fusion"


def differences(expected: list[dict[str, str]], reported: list[dict[str, Any]], skip: Sequence[str] = ()) -> list[str]:
    """One line for each server parameter that is not what the trainer sent; empty if the server is right.

    expected: of one TP size, by rank; reported: `ranks` of the server's answer to `weights_checker` (ask with
    selector "target", so that a draft model is left out); skip: as in ExpectedChecksums.
    """
    places = [_placement(report) for report in reported]
    if (misfit := _misfit(places, len(expected))) is not None:
        return [misfit]
    lines = []
    for place, report in zip(places, reported, strict=True):
        rank = place["tp_rank"]
        lines += _rank_differences(rank, expected[rank], report["checksums"], skip)
    return lines


def _misfit(places: Sequence[dict[str, Any]], tp_size: int) -> str | None:
    """Why these are not one report of each rank of a server that `tp_size` ranks make up; None if they are."""
    ranks = sorted(place["tp_rank"] for place in places)
    if ranks != list(range(tp_size)):
        return f"the server reported checksums of TP ranks {ranks}; they should be of ranks 0 to {tp_size - 1}"
    return None


def _rank_differences(rank: int, ours: dict[str, str], theirs: dict[str, str], skip: Sequence[str]) -> list[str]:
    lines = []
    for parameter in sorted(ours.keys() | theirs.keys()):
        ours_is, theirs_is = ours.get(parameter), theirs.get(parameter)
        # SGLang reports FP8 weights even where it is asked to skip them.
        if ours_is == theirs_is or is_skipped(parameter, skip):
            continue
        where, behind = f"{parameter} on TP rank {rank}", f"made of {', '.join(made_of(parameter))}"
        if theirs_is is None:
            hint = ".shared_experts." in parameter
            lines.append(f"{where}: missing on the server; {behind}" + (_FUSED_HINT if hint else ""))
        elif ours_is is None:
            lines.append(f"{where}: not sent by the trainer; {behind}")
        else:
            lines.append(f"{where}: the server's {theirs_is} is not the trainer's {ours_is}; {behind}")
    return lines


def _placement(report: dict[str, Any]) -> dict[str, Any]:
    """Where the rank stands in the server; one entry a model role, the served model's first."""
    info = report.get("parallelism_info") or {}
    return dict(info[0] if isinstance(info, list) else info)


def is_skipped(parameter: str, skip: Sequence[str]) -> bool:
    return any(part in parameter for part in skip)


def sampled_out(num_layers: int, version: int) -> tuple[str, ...]:
    """Substrings of server tensor names to skip, so that about an eighth of the layers is checked.

    Every layer is checked once in eight versions that follow one another; what is outside layers, always.
    """
    period = min(_SAMPLED_SHARE, num_layers)
    return tuple(f".layers.{i}." for i in range(num_layers) if i % period != version % period)
