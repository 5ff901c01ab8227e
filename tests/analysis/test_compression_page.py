"""The page of compressed activations: what is measured of texts, and what the simulator makes of fewer bytes."""

from pathlib import Path

import torch
from tiny_models import tiny_source

from analysis.compression import Text, compared, frame_bytes, page, slow_link
from backends.models.stage_model import StageModel
from backends.reference import SplitModel, generate_in_one_process

PROMPT = [3, 5, 8, 13] * 20


def test_equal_models_agree_everywhere_and_others_where_they_do(tmp_path: Path) -> None:
    source = tiny_source(tmp_path / "one")
    plain = SplitModel([StageModel(source, 0, 2), StageModel(source, 2, 4)])
    expected = generate_in_one_process(plain, PROMPT, 9)
    assert compared(plain, plain, PROMPT, expected) == Text(9, 9, None, 9)
    other = [*expected[:4], expected[4] + 1, *expected[5:]]
    assert compared(plain, plain, PROMPT, other) == Text(9, 8, 4, 9), "both see the same text, whatever it is"


def test_fewer_bytes_make_slow_links_faster() -> None:
    plain, fp8, int8 = (frame_bytes(16, 576, torch.bfloat16, form) for form in ("none", "fp8", "int8"))
    assert plain - fp8 == 16 * (576 - 4) + len("none") - len("fp8")
    assert int8 - fp8 == len("int8") - len("fp8")
    assert slow_link(8192, 10, "fp8")[0] > 1.3 * slow_link(8192, 10, "none")[0]
    assert slow_link(8192, 10, "fp8")[1] < 0.7 * slow_link(8192, 10, "none")[1]


def test_the_page_shows_every_measurement() -> None:
    text = page({("bfloat16", 2, "fp8"): [Text(9, 5, 5, 10), Text(10, 10, None, 10)]})
    assert "| bfloat16 | 2 | fp8 | 95.0 % | 75.0 % | 5, - |" in text
    assert "Simulated, not measured" in text
