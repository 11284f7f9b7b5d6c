"""The answers to generated requests are as the specification says."""

import pytest

from tests.fuzz_api import fuzz


@pytest.mark.timeout(1200)
def test_two_thousand_generated_requests_are_answered_as_specified() -> None:
    report, cases = fuzz(max_examples=90, seed=1)
    assert cases >= 2000, report
