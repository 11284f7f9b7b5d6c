"""What many tests share. Only ``browser`` imports Playwright; ``cluster`` imports temporalio when it is called."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
#: How long a test waits for something that must happen, in seconds: a busy machine is slow, and that is not a failure.
PATIENCE_S = 100
