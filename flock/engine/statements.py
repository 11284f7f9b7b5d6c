"""The SQL statements of the store, by name, except for migrations, pragmas and what begins or ends a transaction.

Each has its values in the order of its question marks, or by name.
"""

from collections.abc import Iterable

from flock.engine.rows import BATCH_FIELDS, FIELDS
from flock.runs import RunStatus

__all__ = [
    "BATCHES",
    "BATCHES_OF",
    "BATCH_COLUMNS",
    "COLUMNS",
    "COUNT_ITEMS",
    "DROP_OLD_BATCHES",
    "DROP_STAGED",
    "EMPTY",
    "FAIL_BATCH",
    "FAIL_ITEMS",
    "FAIL_RUN",
    "FINAL",
    "INSERT_BATCH",
    "INSERT_RUN",
    "INSERT_STEP",
    "NEWEST",
    "OLD",
    "OLD_RUNS",
    "OUTLINED",
    "OUTLINE_COLUMNS",
    "RUNS_OF",
    "SHORT_COLUMNS",
    "TAKE_BATCH",
    "TAKE_ITEMS",
    "TAKE_RUN",
    "UPDATE",
    "UPDATE_ITEM",
    "UPDATE_RUN",
    "WAITING",
    "WAITING_OF",
    "item_listing",
    "listing",
]

COLUMNS = ", ".join(FIELDS)
#: What stands for a column that is not read.
EMPTY = {
    "inputs": "x'7b7d'",
    "recoveries": "0",
    **dict.fromkeys(("result", "traceparent", "principal", "extra", "last_step"), "NULL"),
}
#: The columns of a row of which only the beginning can be read; a row without inputs counts as damaged.
SHORT_COLUMNS = ", ".join(
    {**EMPTY, "inputs": "x''", "error": "NULL", "progress": "NULL"}.get(name, name) for name in FIELDS
)
#: What stands for a result that is not read, if there is one.
OUTLINED = "CASE typeof(result) WHEN 'blob' THEN x'7b7d' ELSE result END"

OUTLINE_COLUMNS = ", ".join(
    {"inputs": EMPTY["inputs"], "extra": "NULL", "result": OUTLINED}.get(name, name) for name in FIELDS
)
# What a failed commit may have written all the same is written again.
INSERT_RUN = f"INSERT OR REPLACE INTO runs ({COLUMNS}) VALUES ({', '.join('?' * len(FIELDS))})"
UPDATE = """UPDATE runs SET status = ?, result = ?, error = ?, error_type = ?, started_at = ?, completed_at = ?,
    progress = ?, last_step = ? WHERE run_id = ? AND attempt = ? AND status IN ('starting', 'running')"""
UPDATE_RUN = f"{UPDATE} AND owner = ?"
UPDATE_ITEM = f"{UPDATE} AND EXISTS (SELECT 1 FROM batches WHERE batch_id = ? AND owner = ?)"
INSERT_STEP = "INSERT OR REPLACE INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
FAIL_RUN = """UPDATE runs SET status = 'failed', error = ?, error_type = ?, completed_at = ?
    WHERE run_id = ? AND owner = ? AND status IN ('starting', 'running')"""
RUNS_OF = """SELECT run_id FROM runs
    WHERE owner = ? AND status IN ('starting', 'running') AND batch_id IS NULL ORDER BY run_id"""
TAKE_RUN = """UPDATE runs SET owner = ?, attempt = attempt + (status = 'running'),
    recoveries = recoveries + (status = 'running'), status = 'starting'
    WHERE run_id = ? AND owner = ? AND status IN ('starting', 'running')"""
#: Runs of agents that no program has any more wait too, but not for a slot.
WAITING = """FROM runs INDEXED BY runs_by_both WHERE batch_id IS NULL AND flock = ?
    AND agent_name IN (SELECT value FROM json_each(?)) AND status = 'starting'"""
#: The same of one principal.
WAITING_OF = """SELECT count(*) FROM runs INDEXED BY runs_by_principal_and_agent WHERE batch_id IS NULL AND flock = ?
    AND principal = ? AND agent_name IN (SELECT value FROM json_each(?)) AND status = 'starting'"""


def listing(columns: str, statuses: Iterable[str], conditions: str, also: str = "", order: str = "DESC") -> str:
    """A query for runs that are no items, in the order of their ids, and *also* what another query gives.

    SQLite merges the ranges of the statuses as it reads them, so that no index without the status is needed: each one
    that there is takes its time at each write.
    """
    is_of_agent = "agent_name = " in conditions
    index = "runs_by_both" if is_of_agent else "runs_by_status"
    if "principal = " in conditions:
        index = "runs_by_principal_and_agent" if is_of_agent else "runs_by_principal"
    ranges = [
        f"SELECT {columns} FROM runs INDEXED BY {index} WHERE batch_id IS NULL AND {conditions} AND status = '{status}'"
        for status in statuses
    ]
    return f"{' UNION ALL '.join([*ranges, also] if also else ranges)} ORDER BY 1 {order}"


BATCH_COLUMNS = ", ".join(BATCH_FIELDS)
INSERT_BATCH = f"INSERT INTO batches ({BATCH_COLUMNS}, hidden) VALUES ({', '.join('?' * (len(BATCH_FIELDS) + 1))})"
COUNT_ITEMS = """UPDATE batches SET completed_items = completed_items + ?, failed_items = failed_items + ?,
    cancelled_items = cancelled_items + ? WHERE batch_id = ?"""
BATCHES_OF = """SELECT batch_id FROM batches INDEXED BY batches_open
    WHERE owner = ? AND hidden IS NULL AND completed_at IS NULL ORDER BY batch_id"""
FAIL_BATCH = "UPDATE batches SET status = 'failed', error = ?, completed_at = ? WHERE batch_id = ? AND owner = ?"
FAIL_ITEMS = """UPDATE runs SET status = 'failed', error = ?, error_type = ?, completed_at = ?
    WHERE batch_id = ? AND status IN ('starting', 'running')"""
TAKE_BATCH = "UPDATE batches SET owner = ? WHERE batch_id = ? AND owner = ? AND completed_at IS NULL"
TAKE_ITEMS = """UPDATE runs SET attempt = attempt + 1, recoveries = recoveries + 1, status = 'starting'
    WHERE batch_id = ? AND status = 'running'"""
DROP_STAGED = "UPDATE batches SET hidden = 'dropped' WHERE owner = ? AND hidden = 'staged'"
DROP_OLD_BATCHES = """UPDATE batches SET hidden = 'dropped' WHERE batch_id IN (SELECT batch_id FROM batches
    WHERE flock = :flock AND hidden IS NULL AND batch_id < :bound AND completed_at <= :latest
    AND batch_id NOT IN (SELECT value FROM json_each(:kept)) LIMIT :limit)"""


def item_listing(columns: str, statuses: Iterable[str]) -> str:
    """A query for up to :limit items of :batch_id behind :after, in order: SQLite merges the ranges as it reads."""
    ranges = (
        f"SELECT {columns}, position AS place FROM runs INDEXED BY items_by_status "
        f"WHERE batch_id = :batch_id AND status = '{status}' AND position > :after AND position <= {2**63 - 1}"
        for status in statuses
    )
    return f"{' UNION ALL '.join(ranges)} ORDER BY place LIMIT :limit"


BATCHES = "SELECT batch_id FROM batches WHERE flock = :flock AND hidden IS NULL"
NEWEST = f"{listing('run_id', RunStatus, 'flock = :flock', BATCHES)} LIMIT 1 OFFSET :offset"
FINAL = [status for status in RunStatus if status.is_final]
OLD = """flock = :flock AND run_id < :bound AND completed_at <= :latest
    AND run_id NOT IN (SELECT value FROM json_each(:kept))"""
OLD_RUNS = f"{listing('run_id', FINAL, OLD, order='ASC')} LIMIT :limit"
