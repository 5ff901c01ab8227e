"""Models shared by the backend tests."""

import pytest
import torch
from tiny_models import tiny_source

from backends.models.finding import DEFAULT_MODEL, GEMMA, find_model
from backends.models.loading import ModelSource, open_model
from backends.models.stage_model import StageModel
from pipesim.errors import BadInputError


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return tiny_source(tmp_path_factory.mktemp("tiny"))


def open_or_skip(name: str) -> ModelSource:
    """A model that may not be installed. It skips loudly, never with a download."""
    try:
        find_model(name)
    except BadInputError as error:
        pytest.skip(f"SKIPPED: {error}")
    return open_model(name)


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    return open_or_skip(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def gemma() -> ModelSource:
    return open_or_skip(GEMMA)


@pytest.fixture(scope="session")
def smollm2_model(smollm2: ModelSource) -> StageModel:
    return StageModel(smollm2, 0, smollm2.config.layers)
