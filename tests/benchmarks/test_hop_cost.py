"""What a hop costs, and gRPC as such; bounds are loose. ``python -m analysis.hops`` writes the figures down."""

import asyncio
import statistics

import pytest

from analysis.hops import measure_hops, measure_ratio
from backends.models.finding import DEFAULT_MODEL
from backends.models.loading import open_model
from backends.models.native.self_check import kernels_refusal
from pipesim.errors import BadInputError


@pytest.mark.slow
@pytest.mark.skipif(bool(kernels_refusal()), reason=f"SKIPPED: {kernels_refusal()}")
def test_a_hop_of_one_row_costs_little() -> None:
    """The aim is 0.6 ms; docs/hops.md says what it is. A machine that others use doubles it now and then."""
    (hops,) = asyncio.run(measure_hops(payloads=[(1, 576)], runs=60, rounds=1)).values()
    assert statistics.median(hops.between) < 0.9


@pytest.mark.slow
@pytest.mark.model
def test_one_stage_behind_grpc_has_nine_tenths_of_the_bare_loops_speed() -> None:
    try:
        source = open_model(DEFAULT_MODEL)
    except BadInputError as error:
        pytest.skip(f"SKIPPED: {error}")
    assert asyncio.run(measure_ratio(source)).median > 0.9
