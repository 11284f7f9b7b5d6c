"""The bare equal with a record: each response waits until its run is on disk: uvicorn bench.peers.bare_commit:app"""

from bench.peers.bare import RECORDS, app
from bench.peers.commits import GroupCommit

__all__ = ["app"]

RECORDS.append(GroupCommit("commits.db"))
