"""Options and markers shared by all tests."""

import signal

import pytest


def pytest_configure() -> None:
    """A suite started in the background inherits that SIGINT is ignored, and what tests interrupt would, too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="also run tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="SKIPPED: needs a CUDA device"))
    if config.getoption("--runslow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="SKIPPED: takes minutes, run with --runslow"))
