"""Code that tests share. Only ``browser`` imports Playwright, and ``cluster`` imports temporalio when it is called."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
#: How long a test waits for something that must happen, in seconds. It is long because a busy machine is slow.
PATIENCE_S = 100
#: Processes of a server. Most tests of a limit only run with one of them before a merge.
WORKERS = [1, pytest.param(2, marks=pytest.mark.nightly)]
