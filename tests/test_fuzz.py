"""Responses to generated requests match the specification."""

import pytest

from tests.fuzz_api import fuzz


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("at_least", [100, pytest.param(2000, marks=pytest.mark.nightly)])
def test_generated_requests_are_answered_as_specified(at_least: int) -> None:
    report, cases = fuzz(max_examples=at_least // 22, seed=1)
    assert cases >= at_least, report
