"""A tiny model that the command line can talk to."""

from pathlib import Path

import pytest
from talker import save_talker


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``save_talker``."""
    return save_talker(tmp_path_factory.mktemp("talker"))
