"""Models shared by the backend tests."""

import pytest
import torch
from tiny_models import tiny_source

from backends.models.finding import DEFAULT_MODEL, find_model
from backends.models.loading import ModelSource, open_model
from backends.models.stage_model import StageModel
from pipesim.errors import BadInputError


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return tiny_source(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    try:
        find_model(DEFAULT_MODEL)
    except BadInputError as error:
        pytest.skip(f"SKIPPED: {error}")
    return open_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def smollm2_model(smollm2: ModelSource) -> StageModel:
    return StageModel(smollm2, 0, smollm2.config.layers)
