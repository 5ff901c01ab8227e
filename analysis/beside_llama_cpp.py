"""Measures this project's forward pass and whole generations beside llama.cpp's: same file, one thread, in turns.

``python -m analysis.beside_llama_cpp --python OTHER/bin/python -o docs/llama-cpp.md``: OTHER has llama-cpp-python.
"""

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from analysis.forward_speed import ours, take_turns
from analysis.pages import fill, markdown_table
from backends.models.finding import DEFAULT_MODEL
from backends.models.loading import ModelSource, open_model
from backends.models.stage_model import StageModel
from backends.reference import generate_in_one_process
from pipesim.cli.common import check_outputs, diagnostic

ROWS = (1, 4, 16)
TOKENS = 128
PROMPT = tuple(range(100, 132))
THEIRS = "llama.cpp"


class LlamaCpp:
    """llama.cpp in an interpreter of its own."""

    def __init__(self, python: Path, model: Path) -> None:
        command = [str(python), str(Path(__file__).with_name("llama_cpp_child.py")), str(model)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.version = self._hear()

    def rows(self, count: int) -> float:
        """CPU ms of one forward pass."""
        return float(self._ask(f"rows {count}"))

    def generate(self) -> float:
        """CPU ms of a whole generation."""
        return float(self._ask(f"generate {TOKENS} {' '.join(map(str, PROMPT))}"))

    def _ask(self, line: str) -> str:
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._hear()

    def _hear(self) -> str:
        assert self._process.stdout
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise SystemExit("the other interpreter has no llama_cpp, or it failed")
        return answer

    def close(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.wait()


def _generation(model: StageModel) -> Callable[[int], object]:
    return lambda _: generate_in_one_process(model, PROMPT, TOKENS)


def measure(source: ModelSource, other: LlamaCpp, rounds: int) -> dict[str, dict[str, float]]:
    """Median CPU ms by what was done and by whom."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    models = {dtype: ours(source, dtype, "native") for dtype in ("quantized", "bfloat16")}
    forwards = {f"ours, {dtype}": forward for dtype, (_, forward) in models.items()}
    generations = {f"ours, {dtype}": _generation(model) for dtype, (model, _) in models.items()}
    for count in ROWS:
        theirs = []
        ms: dict[str, list[float]] = {name: [] for name in forwards}
        for turn in range(rounds + 1):
            spent = other.rows(count)
            for name, value in take_turns(forwards, [count], 1).items():
                ms[name[0]] += [value] if turn else []
            theirs += [spent] if turn else []
        found[f"{count} row{'s' * (count > 1)}"] = _medians(ms | {THEIRS: theirs})
    whole: dict[str, list[float]] = {name: [] for name in (*generations, THEIRS)}
    for _ in range(3):
        whole[THEIRS].append(other.generate())
        for name, generate in generations.items():
            whole[name] += _once(generate)
    found[f"{len(PROMPT)} + {TOKENS} tokens"] = _medians(whole)
    return found


def _once(generate: Callable[[int], object]) -> list[float]:
    began = time.process_time()
    generate(0)
    return [1e3 * (time.process_time() - began)]


def _medians(ms: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in ms.items()}


def page(found: dict[str, dict[str, float]], version: str) -> str:
    """The page as Markdown."""
    today = datetime.datetime.now(datetime.UTC).date()
    names = list(next(iter(found.values())))
    best = names[0]
    slowest = min(ms[THEIRS] / ms[best] for ms in found.values())
    parts = [
        "# Beside llama.cpp",
        fill(
            f"SmolLM2-135M from the same GGUF file (Q4_1, embedding and LM head Q8_0), one thread each, in turns, on "
            f"{today}: llama-cpp-python {version}, {platform.machine()}, {os.cpu_count()} cores that others use. "
            f"Median CPU milliseconds: forward passes with logits of every row after 256 KV cells, and a greedy "
            f"generation, its prompt included. *quantized* computes with the file's own blocks, as llama.cpp does, "
            "with activations in bfloat16 where llama.cpp rounds them to 8 bits; *bfloat16* with dequantized weights."
        ),
        markdown_table(["", *found], [[name, *(f"{ms[name]:.1f}" for ms in found.values())] for name in names]),
        markdown_table(
            ["ratios", *found],
            [[f"{THEIRS} / {name}", *(f"{ms[THEIRS] / ms[name]:.2f}" for ms in found.values())] for name in names[:-1]],
        ),
        fill(
            f"The aim, at least 1.0 with the fastest exact path, is {'reached' if slowest >= 1 else 'missed'}: "
            f"{slowest:.2f} where it is least. Ours are exact: a row's logits are bit for bit the same in any run."
        ),
        fill(
            "Made by `python -m analysis.beside_llama_cpp --python OTHER/bin/python -o docs/llama-cpp.md`: OTHER is "
            "a virtual environment with llama-cpp-python, compiled for this machine (AVX-512 with bfloat16, no AMX)."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--python", type=Path, required=True, help="an interpreter that has llama_cpp")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each contestant")
    options = parser.parse_args()
    check_outputs(options.output)
    source = open_model(DEFAULT_MODEL)
    other = LlamaCpp(options.python, source.path)
    try:
        options.output.write_text(page(measure(source, other, options.rounds), other.version))
    finally:
        other.close()
    diagnostic(f"wrote {options.output}")


if __name__ == "__main__":
    main()
