"""Costs are measured on a real pipeline as its generations meet them."""

import time
from collections.abc import Iterator

import pytest
from pipelines import LAYERS, RunningPipeline, running, tiny_plan
from tiny_models import save_tiny

from backends.control import DraftOrder, ExtendText, StartText, ToDrafter
from backends.frames import Frame, RunFrame
from backends.head import Head
from backends.probing import LEVELS, Prober, Text
from backends.sampling import Sampling
from pipesim.calibration import HeadSample
from pipesim.recorder import Recorder
from pipesim.scheduling.events import GenerationStarted
from pipesim.scheduling.policy import make_policy
from pipesim.scheduling.scheduler import Scheduler

PROMPT, TOKENS = (5, 9, 5, 9, 17, 5, 9, 5, 33, 80), tuple(range(20, 60))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPipeline]:
    model = save_tiny(tmp_path_factory.mktemp("eight-layers"), num_hidden_layers=LAYERS)
    with running(tiny_plan(model, 2)) as pipeline:
        yield pipeline


def test_each_draft_follows_a_run_and_news_of_the_text(
    pipeline: RunningPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Frame | ToDrafter] = []
    real = pipeline.pipeline
    for name in ("send", "order"):

        def told(message: Frame | ToDrafter, carry: object = getattr(real, name)) -> int:
            sent.append(message)
            return carry(message)  # type: ignore[operator,no-any-return]

        monkeypatch.setattr(real, name, told)
    prober = Prober(real, Text(PROMPT, TOKENS, Sampling(), None), 16)

    async def probe() -> None:
        await prober.open()
        for _ in range(2):
            await prober.measure_round()
        await prober.close()

    pipeline.wait(probe())
    heard = 0
    for before, news, message in zip(sent, sent[1:], sent[2:], strict=False):
        if isinstance(message, StartText):
            heard = len(message.prompt)
        elif isinstance(message, DraftOrder):
            assert isinstance(before, RunFrame)
            assert not before.void
            assert isinstance(news, ExtendText)
            heard += len(news.tokens)
            assert heard == message.request.frontier, "the drafter knows the text that it drafts after"
    new = [one.prefilled for one in prober.drafts]
    assert new == [len(PROMPT), 0, 0, 0, 0, len(TOKENS) - max(LEVELS), 0, 0, 0, 0], "the first round does not count"


def test_the_head_costs_its_processor_time(pipeline: RunningPipeline) -> None:
    """Time in which others have the processor is not the head's: simulations of shared machines add it themselves."""
    handling: list[HeadSample] = []
    recorder = Recorder(Scheduler(make_policy("autoregressive", {})), 0, ["0", "1"])
    head = Head(pipeline.pipeline, recorder, lambda _: time.sleep(0.1), handling=handling)
    pipeline.wait(head.generate(GenerationStarted(PROMPT, 3), Sampling()))
    assert len(handling) >= 3
    assert 0 < sum(one.seconds for one in handling) < 0.1
