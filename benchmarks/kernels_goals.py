"""What the kernels suite must reach."""

from __future__ import annotations

import torch

from benchmarks.geometries import LONG, MIDDLE, SHORT, USUAL_CONTEXT, USUAL_ROWS, Case
from benchmarks.goals import Goal
from benchmarks.measurements import KERNELS, MEMORY, Results
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.results_table import share_of_read, speedup
from benchmarks.units import megabytes, times

# times as fast as the pipeline, of attention_contribution and attention_summary
SPEEDUPS = {("cpu", torch.float32): (100, 200), ("cpu", torch.bfloat16): (50, 50), ("cuda", torch.bfloat16): (50, 100)}
BACKENDS = {"cpu": "torch", "cuda": "triton"}
COMPARED_FROM = MIDDLE  # keys
SPEED_JUDGED_FROM = {"cpu": LONG, "cuda": MIDDLE}  # keys; NOTES.md says what a CPU does at fewer
READ_SHARES = {32: 0.9, 64: 0.8}  # up to so many rows per key/value head: share of the measured read bandwidth
SUMMARY_SHARES = {USUAL_CONTEXT: 0.6, 262_144: 0.55}  # from so many keys on: share of attention_contribution's time
MEMORY_SHARE = 0.01  # of the pipeline's extra memory


def judge(results: Results, device: str) -> list[Goal]:
    """The goals that the cases of this run can decide; windowed layers, which read little, are not among them."""
    cases = [case for case in results.cases if case.geometry.window is None]
    usual = [case for case in cases if case.rows == USUAL_ROWS and case.n_keys >= COMPARED_FROM]
    goals = [goal for case in usual for goal in (*_speed(results, device, case), *_memory(results, device, case))]
    if device == "cuda":
        goals += [goal for case in cases for goal in _bandwidth(results, case)]
        goals += [goal for case in usual for goal in _summary(results, case)]
    return [*goals, *_constant_memory(results, cases)]


def fused(device: str) -> dict[str, Provider]:
    """Function -> provider of it that is meant for the device."""
    backend = BACKENDS[device]
    return {p.name.partition(".")[2]: p for p in PROVIDERS if p.name.startswith(f"{backend}.")}


def _speed(results: Results, device: str, case: Case) -> list[Goal]:
    goals = []
    contribution, summary = SPEEDUPS.get((device, case.dtype), (None, None))
    for function, wanted in (("attention_contribution", contribution), ("attention_summary", summary)):
        provider = fused(device)[function]
        found = speedup(results, provider, case)
        if wanted is not None and found is not None:
            text = f"{provider.name} is {times(found)} as fast as the pipeline, at least {wanted}x: {case.label}"
            judged = case.n_keys >= SPEED_JUDGED_FROM[device]
            goals.append(Goal(text, found >= wanted if judged else None))
    return goals


def _memory(results: Results, device: str, case: Case) -> list[Goal]:
    goals = []
    for function in ("attention_contribution", "attention_summary"):
        provider = fused(device)[function]
        share = results.ratio(provider.name, "pipeline", case, MEMORY)
        if share is not None:
            size = megabytes(results.median(provider.name, case, MEMORY))
            text = (
                f"extra memory of {provider.name} is {share:.2%} of the pipeline's ({size}), at most "
                f"{MEMORY_SHARE:.0%}: {case.label}"
            )
            goals.append(Goal(text, share <= MEMORY_SHARE))
    return goals


def _bandwidth(results: Results, case: Case) -> list[Goal]:
    wanted = next((share for rows, share in READ_SHARES.items() if case.rows_per_kv_head <= rows), None)
    if wanted is None or case.n_keys != USUAL_CONTEXT:
        return []
    goals = []
    for function in ("attention_contribution", "ov_contribution"):
        provider = fused("cuda")[function]
        share = share_of_read(results, provider, case, KERNELS)
        if share is not None:
            text = (
                f"the kernels of {provider.name} reach {share:.0%} of the measured read bandwidth, at least "
                f"{wanted:.0%} at {case.rows_per_kv_head} rows per key/value head: {case.label}"
            )
            goals.append(Goal(text, share >= wanted))
    return goals


def _summary(results: Results, case: Case) -> list[Goal]:
    wanted = min((share for n_keys, share in SUMMARY_SHARES.items() if case.n_keys >= n_keys), default=None)
    share = results.ratio(*(fused("cuda")[f].name for f in ("attention_summary", "attention_contribution")), case)
    if wanted is None or share is None:
        return []
    text = f"attention_summary takes {share:.2f} of attention_contribution's time, at most {wanted}: {case.label}"
    return [Goal(text, share <= wanted)]


def _constant_memory(results: Results, cases: list[Case]) -> list[Goal]:
    """Where a provider ran two contexts, its extra memory is the same to within 2 %.

    Rows copied to look for their largest score depend on the data, and the table of spans takes 8 bytes per 128 keys.
    """
    goals = []
    for case in cases:
        short = case._replace(n_keys=SHORT)
        for provider in PROVIDERS:
            long_bytes = results.median(provider.name, case, MEMORY)
            short_bytes = results.median(provider.name, short, MEMORY)
            if case == short or not provider.constant_memory or long_bytes is None or short_bytes is None:
                continue
            text = (
                f"extra memory of {provider.name} does not depend on N: {megabytes(short_bytes)} at {SHORT}, "
                f"{megabytes(long_bytes)}: {case.label}"
            )
            goals.append(Goal(text, abs(long_bytes - short_bytes) <= 0.02 * short_bytes))
    return goals
