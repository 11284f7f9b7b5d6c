"""Text that appears while it is written: flockapi run examples/writer.py write -i topic=tea --stream"""

from collections.abc import AsyncIterator

import anyio

from flock.core import Flock

flock = Flock("writer")


@flock.agent
async def write(topic: str) -> AsyncIterator[str]:
    """Write about a topic."""
    for word in ("All ", "about ", topic):
        yield word
        await anyio.sleep(0.2)
