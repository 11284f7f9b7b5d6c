"""Write ``flock/static/openapi.json`` from ``openapi.yaml``, so that serving it needs no YAML parser.

python -m tests.openapi_twin
"""

import json

from tests.support.spec import TWIN, source

if __name__ == "__main__":
    TWIN.write_text(json.dumps(source(), indent=1, ensure_ascii=False) + "\n", "utf-8")
