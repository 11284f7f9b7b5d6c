"""Makes ``flock/static/openapi.json`` from ``openapi.yaml``, so that no YAML parser is needed to serve it.

python -m tests.openapi_twin
"""

import json
from typing import Any

import yaml

from tests.fakes import ROOT

TWIN = ROOT / "flock" / "static" / "openapi.json"


def source() -> Any:
    return yaml.safe_load((ROOT / "openapi.yaml").read_text("utf-8"))


if __name__ == "__main__":
    TWIN.write_text(json.dumps(source(), indent=1, ensure_ascii=False) + "\n", "utf-8")
