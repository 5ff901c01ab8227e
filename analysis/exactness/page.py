"""The campaign's page: what was combined, how much speculation that was, what was wrong, what defects it finds."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.exactness.campaign import EQUAL, Outcome
from analysis.exactness.combinations import PER_PIPELINE, Combination, Setup, draw_combination, draw_setup
from analysis.exactness.mutations import DEFECTS
from analysis.pages import fill, markdown_table


def page(outcomes: Sequence[Outcome], defective: Mapping[str, Sequence[Outcome]], commit: str) -> str:
    """The page as Markdown; ``commit`` is what was run."""
    table = frame(outcomes)
    bad = [outcome for outcome in outcomes if outcome["verdict"] != EQUAL]
    fates: Counter[str] = sum((Counter(one.get("fates", {})) for one in outcomes), Counter())
    spoken = ", ".join(f"{count} {fate}" for fate, count in fates.most_common())
    ends = ", ".join(f"{count} by {end}" for end, count in Counter(table["end"]).most_common())
    columns = ["setups", "combinations", "equal", "tokens", "distinct", "drafted", "accepted", "forks", "void"]
    killed = sum(outcome.get("killed", 0) for outcome in outcomes)
    good = len(outcomes) - len(bad)
    again = f"`python -m analysis.exactness --only {outcomes[-1]['number']}`"
    tables = [markdown_table([by, *columns], _rows(table, by)) for by in ("family", "arithmetic", "policy", "drafter")]
    parts = [
        "# Exactness: no text ever changes",
        f"{len(outcomes)} random combinations, **{good} of them with the text of plain decoding, token for token, and "
        f"an event log that replays (I9)**; {len(bad)} bad (commit {commit}). Each is a generation on a pipeline of "
        "processes over gRPC, held against a plain loop in one process: prompt in chunks, then one row at a time, no "
        "scheduler.",
        *_failures(bad),
        "Combined at random: the policy with all its settings and switches; the drafter (n-gram, planted, layer-skip, "
        "or a draft model: here the target's first layers); stages and their sizes; micro-batch, branches, bars of "
        "confidence, partitions; KV cells, down to not one to spare; temperature, top-k, top-p, min-p, repetition "
        "penalty, seed; the model's family; the type of its weights (*quantized*: the blocks of a GGUF file), by the "
        "native kernels (*auto*) or by PyTorch's; prompts of 1 to 200 tokens, many at the edge of a block; end tokens "
        f"and stop strings; in every tenth, a stage to be killed at some run ({killed} came so far). {PER_PIPELINE} "
        f"combinations share a pipeline. All is a function of a combination's number: {again} runs one alone.",
        "## How much speculation that was",
        *tables,
        "*setups*: different pipelines. *distinct*: different tokens of a text, of its tokens: models are random, but "
        "their texts are not one token again and again. *drafted*: drafted tokens whose fate the text decided; "
        "*accepted*: those that became text. *forks*: runs with several branches of two tokens and more. *void*: spans "
        "of stages that broke off a cancelled run, or passed it on.",
        f"Runs by their fate: {spoken}. Texts ended: {ends}.",
        "## What the campaign finds",
        "The same with a defect put in on purpose, in the stages' processes or in the head, on "
        f"{len(next(iter(defective.values())))} combinations. Plain decoding stays as it is.",
        _defects(defective),
        *_gaps(defective),
        "Bits of logits, not only texts, are compared in `tests/backends/test_exact.py`.",
        "Made by `python -m analysis.exactness -o docs/exactness.md`.",
    ]
    return "\n\n".join(part if part.startswith("|") else fill(part) for part in parts) + "\n"


def frame(outcomes: Iterable[Outcome]) -> pd.DataFrame:
    """One line per outcome, with what was drawn."""
    return pd.DataFrame([_line(outcome) for outcome in outcomes])


def _line(outcome: Outcome) -> dict[str, Any]:
    combination: Combination = draw_combination(outcome["number"])
    setup: Setup = draw_setup(combination.pipeline)
    kind = {
        "family": setup.family,
        "arithmetic": f"{setup.dtype} ({setup.kernels})",
        "policy": combination.policy,
        "drafter": setup.drafter,
        "setup": setup.number,
    }
    return {**kind, "end": "an error", **dict.fromkeys(_COUNTED, 0), **outcome}


_COUNTED = ("tokens", "distinct", "verified", "accepted", "forks", "void_spans")


def _rows(table: pd.DataFrame, by: str) -> list[list[object]]:
    rows = []
    for name, part in table.groupby(by):
        accepted, drafted = part["accepted"].sum(), part["verified"].sum()
        rows.append(
            [
                name,
                part["setup"].nunique(),
                len(part),
                (part["verdict"] == EQUAL).sum(),
                part["tokens"].sum(),
                f"{part['distinct'].sum() / max(1, part['tokens'].sum()):.0%}",
                drafted,
                f"{accepted / drafted:.0%}" if drafted else "-",
                part["forks"].sum(),
                part["void_spans"].sum(),
            ]
        )
    return rows


def _failures(bad: Sequence[Outcome]) -> list[str]:
    rows = [[outcome["number"], outcome["verdict"].replace("\n", " ")[:120]] for outcome in bad]
    return [markdown_table(["combination", "what was wrong"], rows)] if bad else []


def _defects(defective: Mapping[str, Sequence[Outcome]]) -> str:
    rows = []
    for name, outcomes in defective.items():
        found = [outcome["verdict"] for outcome in outcomes if outcome["verdict"] != EQUAL]
        texts, endless = (sum(words in verdict for verdict in found) for words in ("another", "no end"))
        rows.append([f"{name}: {DEFECTS[name]}", len(found), texts, len(found) - texts - endless, endless])
    return markdown_table(["defect", "found in", "another text", "stopped by a check", "no end"], rows)


def _gaps(defective: Mapping[str, Sequence[Outcome]]) -> list[str]:
    missed = [name for name, outcomes in defective.items() if all(one["verdict"] == EQUAL for one in outcomes)]
    return [f"Not found, which is a gap of the campaign: {', '.join(missed)}."] if missed else []
