"""The records of runs and batches, what a running agent can do, and the engine protocol."""

# ruff: noqa: F403 - the package offers what its modules offer
from flock.runs.context import *
from flock.runs.events import *
from flock.runs.ids import *
from flock.runs.protocol import *
from flock.runs.records import *
from flock.runs.text import *
from flock.runs.usage import *
