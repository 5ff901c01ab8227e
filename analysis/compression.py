"""Measures what compressed activations do to text and speed (``execution.activation_compression``).

``python -m analysis.compression -o docs/compression.md`` generates with SmolLM2-135M cut into 2 and 4 stages in one
process, activations compressed between them as on the wire; times encoding; and simulates slow links, on which the
simulator counts the bytes of the same setting. Takes a few minutes.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from analysis.pages import fill, markdown_table
from analysis.prompts import PROMPTS, Prompt
from backends.compression import to_activation, to_hidden
from backends.frames import TOKEN_BYTES, Compression, RunFrame, Session, decode, encode
from backends.models.finding import DEFAULT_MODEL
from backends.models.loading import ModelSource, open_model
from backends.models.stage_model import StageModel
from backends.placement import split_layers
from backends.reference import PREFILL_CHUNK, SplitModel, generate_in_one_process
from backends.sampling import Sampling
from backends.tokenizer import ModelTokenizer, open_tokenizer
from pipesim.cli.common import check_outputs, diagnostic
from pipesim.metrics import compute_metrics
from pipesim.scenario_file import build_scenario
from pipesim.scheduling.runs import Run, RunKind
from pipesim.simulation.pipeline import simulate

FORMS: tuple[Compression, ...] = get_args(Compression)
LOSSY = FORMS[1:]
STAGES = (2, 4)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDTHS = (576, 8192)
LINKS_MBPS = (1, 10, 100)


# -- text --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Text:
    """One prompt's compressed text held against the plain one of the same stages.

    ``agreeing``: at so many of the plain text's positions, given the text so far, both choose the same token. ``equal``
    of ``tokens`` are equal, place by place; the ``first`` that differs, None if none does.
    """

    agreeing: int
    equal: int
    first: int | None
    tokens: int


def next_tokens(model: StageModel | SplitModel, text: Sequence[int], first: int) -> list[int]:
    """What the model would say after each token of ``text`` from ``first`` on."""
    model.open_session(-1, len(text), 1, Sampling())
    predicted: list[int] = []
    for start in range(0, len(text), PREFILL_CHUNK):
        tokens = tuple(text[start : start + PREFILL_CHUNK])
        positions = tuple(range(start, start + len(tokens)))
        unread = min(max(first - start, 0), len(tokens))
        run = Run(start, 0, RunKind.PREFILL, tokens, positions, (1,) * len(tokens), unread)
        found = model.forward(-1, run, None, model.admit(-1, run))
        assert isinstance(found, list)
        predicted += found
    model.close_session(-1)
    return predicted


def compared(plain: SplitModel, lossy: SplitModel, prompt: Sequence[int], expected: Sequence[int]) -> Text:
    """``expected`` is the plain text after ``prompt``."""
    found = generate_in_one_process(lossy, prompt, len(expected))
    text, first = [*prompt, *expected[:-1]], len(prompt) - 1
    both = zip(next_tokens(plain, text, first), next_tokens(lossy, text, first), strict=True)
    same = [one == other for one, other in zip(found, expected, strict=True)]
    return Text(
        agreeing=sum(one == other for one, other in both),
        equal=sum(same),
        first=same.index(False) if False in same else None,
        tokens=len(expected),
    )


def measure_text(
    source: ModelSource, prompts: Sequence[Sequence[int]], tokens: int
) -> dict[tuple[str, int, Compression], list[Text]]:
    """For each type of weights, number of stages and compression the texts of ``prompts``."""
    found = {}
    for name, dtype in DTYPES.items():
        expected: list[list[int]] = []
        for count in STAGES:
            stages, first = [], 0
            for layers in split_layers(source.config, count):
                stages.append(StageModel(source, first, first + layers, dtype))
                first += layers
            plain = SplitModel(stages)
            # uncompressed, it does not matter where stages end
            expected = expected or [generate_in_one_process(plain, prompt, tokens) for prompt in prompts]
            for form in LOSSY:
                lossy = SplitModel(stages, form)
                pairs = zip(prompts, expected, strict=True)
                found[name, count, form] = [compared(plain, lossy, prompt, text) for prompt, text in pairs]
                diagnostic(f"{name}, {count} stages, {form}: done")
    return found


# -- bytes and time ----------------------------------------------------------------------------------------------------


def _frame(hidden: torch.Tensor, form: Compression) -> RunFrame:
    rows = len(hidden)
    run = Run(9, 0, RunKind.CANONICAL, (1000,) * rows, tuple(range(200, 200 + rows)), (1,) * rows)
    return RunFrame(Session(b"t" * TOKEN_BYTES, 1, 0), run, to_activation(hidden, form))


def frame_bytes(rows: int, width: int, dtype: torch.dtype, form: Compression) -> int:
    """A whole frame between stages."""
    return len(encode(_frame(torch.randn(rows, width).to(dtype), form)))


def _microseconds(work: Callable[[], object], repeats: int = 400) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def coding_us(width: int, form: Compression) -> tuple[float, float]:
    """Microseconds to make a frame of one row of bfloat16, and to make hidden states of it again."""
    hidden = torch.randn(1, width).bfloat16()
    data = encode(_frame(hidden, form))

    def read() -> torch.Tensor:
        frame = decode(data)
        assert isinstance(frame, RunFrame)
        assert frame.activation
        return to_hidden(frame.activation)

    return _microseconds(lambda: encode(_frame(hidden, form))), _microseconds(read)


# -- slow links --------------------------------------------------------------------------------------------------------


def slow_link(hidden: int, mbps: float, form: Compression) -> tuple[float, float]:
    """Simulated: tokens per second of plain decoding over four stages, and the time to the first token in seconds."""
    stage = {"layers": None, "repeat": 4, "cost": {"kind": "linear", "constant_ms": 10, "prefill_per_token_ms": 1}}
    raw: dict[str, Any] = {
        "model": {"name": "bfloat16", "layers": 32, "hidden": hidden},
        "cluster": {
            "stages": [stage],
            "drafter": {"level_ms": 0},
            "links": {"latency_ms": 1, "bandwidth_gbps": mbps / 1000},
        },
        "workload": {"prompt_tokens": 256, "max_new_tokens": 64},
        "policy": {"name": "autoregressive"},
        "acceptance": {"kind": "iid", "rate": 0.5},
        "execution": {"dtype": "bfloat16", "activation_compression": form},
    }
    metrics = compute_metrics(simulate(build_scenario(raw, "slow link")))
    assert metrics.tokens_per_second is not None
    assert metrics.ttft_s is not None
    return metrics.tokens_per_second, metrics.ttft_s


# -- the page ----------------------------------------------------------------------------------------------------------


def page(texts: Mapping[tuple[str, int, Compression], Sequence[Text]]) -> str:
    """The page as Markdown."""
    tokens = sum(text.tokens for text in next(iter(texts.values())))
    text_rows = []
    for (dtype, stages, form), found in texts.items():
        firsts = ", ".join("-" if text.first is None else str(text.first) for text in found)
        shares = (100 * sum(counts) / tokens for counts in zip(*((t.agreeing, t.equal) for t in found), strict=True))
        text_rows.append([dtype, str(stages), form, *(f"{share:.1f} %" for share in shares), firsts])
    sizes = [
        [f"{rows} x {width}", f"{frame_bytes(rows, width, torch.float32, 'none'):,}"]
        + [f"{frame_bytes(rows, width, torch.bfloat16, form):,}" for form in FORMS]
        for width in WIDTHS
        for rows in (1, 16, 64)
    ]
    times = [
        [str(width), *(" / ".join(f"{us:.0f}" for us in coding_us(width, form)) for form in FORMS)] for width in WIDTHS
    ]
    links = [
        [str(width), str(mbps), *("{:.2f} / {:.1f}".format(*slow_link(width, mbps, form)) for form in FORMS)]
        for width in WIDTHS
        for mbps in LINKS_MBPS
    ]
    parts = [
        "# Compressed activations",
        fill(
            "`execution.activation_compression: fp8` or `int8` sends activations in one byte per element and a float32 "
            "scale per row, instead of 2 bytes (bfloat16 weights) or 4 per element. It is lossy, off unless asked for, "
            "and named in what generate, execute and compare print. Rows are compressed one by one, so the text is "
            "the same for every policy, micro-batch and recovery; it depends on the compression and on where stages "
            "end."
        ),
        "## What it does to the text",
        fill(
            f"SmolLM2-135M, {len(PROMPTS)} prompts, {tokens} tokens in all, greedy. *Same choice*: given the "
            "plain text so far, the most probable next token is that of the plain model. *Same place*: share of the "
            "generated texts' tokens that are equal place by place; once one differs, those after it are another text. "
            "*First difference*: token at which it begins, prompt by prompt (-: none)."
        ),
        markdown_table(["weights", "stages", "", "same choice", "same place", "first difference"], text_rows),
        "## Bytes of a frame",
        "A run between two stages, header and metadata included.",
        markdown_table(["rows x width", "float32", *(f"bfloat16, {form}" for form in FORMS)], sizes),
        "## Time",
        fill(
            "Microseconds to make a frame of one row of bfloat16, and to check it and make hidden states of it: "
            "medians, one thread."
        ),
        markdown_table(["width", *FORMS], times),
        "## Slow links",
        fill(
            "Simulated, not measured: tokens/s of plain decoding / seconds to the first token. Four stages of 10 ms "
            "(prefill 1 ms per token), 1 ms latency, a prompt of 256 tokens, bfloat16 activations. The simulator reads "
            "the same setting; it leaves out the time of encoding above."
        ),
        markdown_table(["width", "Mbit/s", *FORMS], links),
        "Made by `python -m analysis.compression -o docs/compression.md`.",
    ]
    return "\n\n".join(parts) + "\n"


def _encoded(tokenizer: ModelTokenizer, prompt: Prompt) -> list[int]:
    if prompt.chat:
        return list(tokenizer.encode_chat([{"role": "user", "content": prompt.text}]))
    return list(tokenizer.encode(prompt.text))


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--tokens", type=int, default=64, help="per prompt")
    options = parser.parse_args()
    check_outputs(options.output)
    torch.set_num_threads(1)
    source = open_model(DEFAULT_MODEL)
    tokenizer = open_tokenizer(source)
    prompts = [_encoded(tokenizer, prompt) for prompt in PROMPTS]
    options.output.write_text(page(measure_text(source, prompts, options.tokens)))
    diagnostic(f"wrote {options.output}")


if __name__ == "__main__":
    main()
