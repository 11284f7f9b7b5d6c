"""The records of runs and batches, what a running agent can do, and the engine protocol."""

# ruff: noqa: F403 - the package offers what its modules offer
from flock.runs import client, context, events, ids, protocol, records, text, usage
from flock.runs.client import *
from flock.runs.context import *
from flock.runs.events import *
from flock.runs.ids import *
from flock.runs.protocol import *
from flock.runs.records import *
from flock.runs.text import *
from flock.runs.usage import *

__all__: list[str] = []
__all__ += client.__all__
__all__ += context.__all__
__all__ += events.__all__
__all__ += ids.__all__
__all__ += protocol.__all__
__all__ += records.__all__
__all__ += text.__all__
__all__ += usage.__all__
