"""The SQL statements of the store, except for migrations, pragmas and transaction control.

Parameters are positional (``?``) or named (``:name``). Statements that depend on more than parameters are functions.
"""

import functools
from collections.abc import Collection, Iterable

from flock.runs import RunStatus, Usage
from flock.store.columns import BATCH_TABLE, CALL_TABLE, RUN_TABLE, STEP_TABLE, SUSPENDED, UPDATED, WEBHOOK_TABLE


def _marks(columns: Collection[str]) -> str:
    return ", ".join("?" * len(columns))


def _replaced(columns: Collection[str], **instead: str) -> str:
    return ", ".join(instead.get(name, name) for name in columns)


COUNT_TABLES = "SELECT count(*) FROM sqlite_master"

#: The first columns of a row, which are quick to read even if the row is long. Columns that were added later are at the
#: end of a row.
HEAD = (
    "run_id flock agent_name status error_type created_at started_at completed_at request_id "
    "batch_id position is_async attempt timeout_s owner cancel_requested"
).split()


def _columns_of_run(read: Collection[str], **instead: str) -> str:
    """Return the columns of a run, with placeholders for those that are not in *read*."""
    columns = {name: name if name in read else column.placeholder for name, column in RUN_TABLE.items()}
    return ", ".join((columns | instead).values())


RUN_COLUMNS = ", ".join(RUN_TABLE)
#: The columns of a row if only its beginning can be read. Its empty inputs mark it as damaged.
SHORT_COLUMNS = _columns_of_run(HEAD, inputs="x''")
#: NULL, a result of up to 1 KiB, or the placeholder for a longer one, which is not read.
OUTLINED = "CASE WHEN typeof(result) = 'blob' AND length(result) > 1024 THEN x'7b7d' ELSE result END"
OUTLINE_COLUMNS = _columns_of_run(RUN_TABLE.keys() - {"inputs", "extra", "client"}, result=OUTLINED)
ITEM_COLUMNS = _columns_of_run(RUN_TABLE.keys() - {"last_step"})


def list_columns(with_inputs: bool, with_results: bool) -> str:
    """Return the columns of a run in a list."""
    long = {"inputs": with_inputs, "session_id": with_inputs, "result": with_results}  # it is stored after the inputs
    read = {*HEAD, "progress", "error", "principal", *(name for name, is_read in long.items() if is_read)}
    return _columns_of_run(read, waiting_for="CASE status WHEN 'waiting' THEN waiting_for END")


#: See ``queries.find_spent``.
SPENT_COLUMNS = "run_id, spent, length(inputs) + ifnull(length(result), 0)"


@functools.lru_cache
def usage_of_day(by: tuple[str, ...], *, of_all: bool) -> str:
    """Return the query for the usage of :day, by these columns, of all principals or of :principal.

    Sums are floats, because a sum of integers may fail. They are exact up to 2**53.
    """
    condition = "" if of_all else "AND principal = :principal"
    return f"""SELECT {", ".join([*by, *(f"total({name})" for name in _COUNTS)])} FROM usage
        WHERE flock = :flock AND day = :day {condition} GROUP BY {", ".join(["flock", *by])}"""


def find_run(columns: str, name: str = "run_id") -> str:
    return f"SELECT {columns} FROM runs WHERE {name} = ?"


#: A run, or its outline, and whether it has rows in ``steps``, which the shortest runs do not.
_HAS_STEPS = "EXISTS (SELECT 1 FROM steps WHERE steps.run_id = runs.run_id)"
WHOLE_RUN = find_run(f"{RUN_COLUMNS}, {_HAS_STEPS}")
OUTLINE_OF_RUN = find_run(f"{OUTLINE_COLUMNS}, {_HAS_STEPS}")


#: An insert is retried after a failed commit, which may have written the row anyway. It keeps its rowid, which is its
#: place in its session, and a cancellation that was requested meanwhile.
_AGAIN = f"""ON CONFLICT DO UPDATE SET
    {", ".join(f"{name} = excluded.{name}" for name in RUN_TABLE if name != "cancel_requested")}"""


@functools.lru_cache
def insert_run(columns: tuple[str, ...]) -> str:
    """Return a statement that inserts a run. The columns that are not in *columns* are NULL."""
    return f"INSERT INTO runs ({', '.join(columns)}) VALUES ({_marks(columns)}) {_AGAIN}"


@functools.lru_cache
def insert_runs(shared: tuple[str, ...], own: tuple[str, ...], count: int) -> str:
    """Return a statement that inserts *count* runs, given the columns that they share, and then those of each."""
    rows = ", ".join([f"({_marks(own)})"] * count)
    return f"""INSERT INTO runs ({", ".join([*shared, *own])})
        SELECT {_marks(shared)}, own.* FROM (VALUES {rows}) AS own WHERE true {_AGAIN}"""


UPDATE = f"""UPDATE runs SET {", ".join(f"{name} = ?" for name in UPDATED)}, last_step = ?
    WHERE run_id = ? AND attempt = ? AND status IN ('starting', 'running')"""
UPDATE_RUN = f"{UPDATE} AND owner = ?"
#: The number of the version of its agent that executes the items of a batch now.
_VERSION = "iif(json_valid(CAST(versions AS TEXT)), json_array_length(CAST(versions AS TEXT)), NULL)"
VERSION_OF_OWN_BATCH = f"SELECT {_VERSION} FROM batches WHERE batch_id = ? AND owner = ?"
UPDATE_ITEM = UPDATE.replace(" SET ", " SET version_number = ?, ", 1)
#: Changes nothing if the run was cancelled.
SUSPEND_RUN = f"""UPDATE runs SET {", ".join(f"{name} = ?" for name in SUSPENDED)}, expires_at = ?, is_asleep = ?,
    status = 'waiting', is_async = 1 WHERE run_id = ? AND cancel_requested = 0"""
RESUME_RUN = """UPDATE runs SET status = 'starting', owner = ?, waiting_for = ?, expires_at = NULL, deaths = 0
    WHERE run_id = ? AND status = 'waiting'"""
SET_WAITS = "UPDATE runs SET waiting_for = ? WHERE run_id = ?"
END_WAITING_RUN = """UPDATE runs SET status = ?, error = ?, error_type = ?, completed_at = ?, expires_at = NULL
    WHERE run_id = ? AND status = 'waiting'"""
#: The runs, and the items of batches, with a question that has expired.
EXPIRED_RUNS = """SELECT run_id FROM runs INDEXED BY runs_expiring
    WHERE flock = ? AND status = 'waiting' AND expires_at <= ?"""
SPENT = "SELECT spent, spent_by FROM runs WHERE run_id = ?"
SET_SPENT = "UPDATE runs SET spent = ?, spent_by = ? WHERE run_id = ?"
#: Larger sums would become inexact. It is 4 million US dollars.
MAX_SUM = 4 * 10**18
_COUNTS = Usage.__struct_fields__
ADD_USAGE = f"""INSERT INTO usage (flock, day, principal, agent_name, model, {", ".join(_COUNTS)})
    VALUES (?, ?, ?, ?, ?, {_marks(_COUNTS)}) ON CONFLICT DO UPDATE SET
    {", ".join(f"{name} = min({MAX_SUM}, {name} + excluded.{name})" for name in _COUNTS)}"""
#: What a principal may spend in a day and has spent, with one row for each of its runs that may have spent more. It is
#: one statement, so it sees one state of the store.
ACCOUNT = """SELECT account.*, run_id, spent_by FROM
    (SELECT (SELECT max_cost FROM budgets WHERE flock = :flock AND principal = :principal),
    (SELECT total(picodollars) FROM usage WHERE flock = :flock AND day = :day AND principal = :principal)) AS account
    LEFT JOIN runs ON run_id IN (SELECT value FROM json_each(:runs))"""
SET_BUDGET = "INSERT OR REPLACE INTO budgets VALUES (?, ?, ?)"
DELETE_BUDGET = "DELETE FROM budgets WHERE flock = ? AND principal = ?"
DELETE_OLD_USAGE = "DELETE FROM usage WHERE flock = ? AND day < ?"
SET_MAX_COST = "UPDATE runs SET max_cost = ? WHERE run_id = ?"
USAGE_OF_BATCH = "SELECT usage FROM batches WHERE batch_id = ?"
SET_USAGE_OF_BATCH = "UPDATE batches SET usage = ? WHERE batch_id = ?"
COUNT_WAITING_ITEMS = "UPDATE batches SET waiting_items = waiting_items + ? WHERE batch_id = ?"
CANCEL_RUN = "UPDATE runs SET cancel_requested = 1 WHERE run_id = ? AND status IN ('starting', 'running')"
_FAIL = "UPDATE runs SET status = 'failed', error = ?, error_type = ?, completed_at = ?"
FAIL_RUN = f"{_FAIL} WHERE run_id = ? AND owner = ? AND status IN ('starting', 'running')"
TAKE_RUN = """UPDATE runs SET owner = ?, attempt = attempt + (status = 'running'),
    recoveries = recoveries + (status = 'running'), worked_s = CASE status WHEN 'running' THEN 0 ELSE worked_s END,
    status = 'starting' WHERE run_id = ? AND owner = ? AND status IN ('starting', 'running')"""
#: Of those that a dead process was executing, those that can start again.
EXECUTED_RUNS = """SELECT run_id, batch_id FROM runs WHERE run_id IN (SELECT value FROM json_each(?))
    AND status = 'starting' AND cancel_requested = 0"""
#: The deaths in which it was alone count from the same time on.
COUNT_DEATH = """UPDATE runs SET deaths_alone = (deaths > 0) * deaths_alone + ?, deaths = deaths + 1 WHERE run_id = ?"""
CLEAR_DEATHS = "UPDATE runs SET deaths = 0 WHERE run_id = ?"
#: A run that was alone at a death is the cause of it, unless somebody happened to kill the process just then.
FAIL_CRASHED = f"{_FAIL} WHERE run_id = ? AND deaths >= ? AND deaths_alone >= ?"
SUSPECTS = """SELECT run_id, batch_id, deaths FROM runs INDEXED BY runs_that_died
    WHERE deaths > 0 AND deaths > 1 AND status = 'starting' AND cancel_requested = 0"""
#: Whether unfinished runs of an engine, or items of its batches, were running in a death before.
MAY_HAVE_SUSPECTS = """SELECT 1 FROM runs INDEXED BY runs_that_died
    WHERE deaths > 0 AND status IN ('starting', 'running') AND (owner = ? OR EXISTS
    (SELECT 1 FROM batches WHERE batches.batch_id = runs.batch_id AND batches.owner = ?)) LIMIT 1"""
#: The parameters are whether the retry executes all calls again, and all who have retried the run, as JSON.
REOPENED = """status = 'starting', attempt = attempt + 1, result = NULL, error = NULL, error_type = NULL,
    started_at = NULL, completed_at = NULL, progress = NULL, cancel_requested = 0, waiting_for = NULL, worked_s = 0,
    deaths = 0, journal = CASE WHEN ? THEN NULL ELSE ifnull(journal, attempt - recoveries) END,
    earlier_error = error, retried_by = ?"""
REOPEN_RUN = f"""UPDATE runs SET {REOPENED}, owner = ?, is_async = 1,
    rowid = CASE WHEN session_id IS NULL THEN rowid ELSE (SELECT max(rowid) + 1 FROM runs) END
    WHERE run_id = ? AND batch_id IS NULL AND status IN ('failed', 'cancelled')"""
DELETE_RUN = "DELETE FROM runs WHERE run_id = ?"
DELETE_FINAL_RUN = f"{DELETE_RUN} AND batch_id IS NULL AND status NOT IN ('starting', 'running', 'waiting')"
#: What is deleted with a run.
DELETE_DETAILS = [
    f"DELETE FROM {table} WHERE run_id = ?" for table in ("steps", "calls", "questions", "model_calls", "messages")
]
ROW_OF_RUN = "SELECT rowid FROM runs WHERE run_id = ?"
#: Whether a run is of a principal. It reads only the first columns and an index, so it takes as long for any run.
IS_OF_PRINCIPAL = """SELECT 1 FROM runs WHERE run_id = ? AND CASE WHEN batch_id IS NULL THEN
    EXISTS (SELECT 1 FROM runs AS own INDEXED BY runs_by_principal WHERE own.batch_id IS NULL AND own.flock = runs.flock
        AND own.principal = ? AND own.status = runs.status AND own.run_id = runs.run_id)
    ELSE EXISTS (SELECT 1 FROM batches WHERE batches.batch_id = runs.batch_id AND batches.principal = ?) END"""
#: SQLite does not read a value for its length.
INPUT_BYTES = "SELECT length(inputs) FROM runs WHERE run_id = ?"
NEWEST_ID = "SELECT max(run_id) FROM runs"
#: A value that changes when the columns OUTLINE_COLUMNS change.
VERSION = """SELECT status, attempt, progress, CASE status WHEN 'waiting' THEN waiting_for END,
    (SELECT count(*) FROM steps WHERE steps.run_id = runs.run_id) FROM runs WHERE run_id = ?"""
#: The nearest run of the same session that was accepted earlier and has not ended. Rows are inserted in the order of
#: acceptance, over all processes, so that order is the order of their rowids. Ids are created before that.
ACTIVE_BEFORE = """SELECT run_id FROM runs INDEXED BY sessions_active
    WHERE flock = ? AND session_id = ? AND principal IS ? AND status IN ('starting', 'running')
    AND rowid < (SELECT rowid FROM runs WHERE run_id = ?) ORDER BY rowid DESC LIMIT 1"""
LATER_RUN = """SELECT run_id FROM runs INDEXED BY runs_by_session_and_principal
    WHERE batch_id IS NULL AND flock = ? AND session_id = ? AND principal IS ?
    AND status IN ('starting', 'running', 'waiting', 'completed', 'failed', 'cancelled') AND run_id > ? LIMIT 1"""
EARLIER_RUNS = """SELECT run_id FROM runs INDEXED BY runs_by_session_and_principal
    WHERE batch_id IS NULL AND flock = ? AND session_id = ? AND status = 'completed' AND principal IS ?
    AND agent_name = ? AND rowid < (SELECT rowid FROM runs WHERE run_id = ?) ORDER BY run_id DESC LIMIT ?"""
UNFINISHED_RUNS = """SELECT run_id FROM runs
    WHERE owner = ? AND status IN ('starting', 'running') AND batch_id IS NULL ORDER BY run_id"""
RUNS_TO_CANCEL = """SELECT run_id, attempt FROM runs INDEXED BY cancels WHERE cancel_requested = 1
    AND status IN ('starting', 'running') AND (owner = ? OR EXISTS
    (SELECT 1 FROM batches WHERE batches.batch_id = runs.batch_id AND batches.owner = ?))"""
ENDED = """SELECT value FROM json_each(?) WHERE NOT EXISTS
    (SELECT 1 FROM runs WHERE run_id = value AND (status IN ('starting', 'running') OR
    (status = 'waiting' AND is_asleep = 1))) AND NOT EXISTS
    (SELECT 1 FROM batches WHERE batch_id = value AND status IN ('starting', 'running'))"""
#: Limited to the agents of this program: runs of agents that no program has wait too, but not for a slot.
QUEUED = """FROM runs INDEXED BY runs_by_both WHERE batch_id IS NULL AND flock = ?
    AND agent_name IN (SELECT value FROM json_each(?)) AND status = 'starting'"""
QUEUE = f"""SELECT agent_name, count(*), min(CASE WHEN attempt = 1 AND started_at IS NULL THEN created_at END) {QUEUED}
    GROUP BY agent_name"""
COUNT_QUEUED = f"SELECT count(*) {QUEUED}"
#: Reading an index for a count takes milliseconds for as many.
MAX_COUNT = 100_000
COUNT_ASKING = f"""SELECT count(*) FROM (SELECT 1 FROM runs INDEXED BY runs_asking WHERE batch_id IS NULL AND flock = ?
    AND agent_name IN (SELECT value FROM json_each(?)) AND status = 'waiting' AND is_asleep = 0 LIMIT {MAX_COUNT})"""
_OPEN = "FROM questions INDEXED BY questions_by_age WHERE flock = :flock AND is_open = 1"
_PENDING = "FROM webhooks INDEXED BY webhooks_by_status WHERE flock = :flock AND status = 'pending'"
#: The open questions and the webhooks that wait: how many, and since when the oldest one.
BACKLOG = f"""SELECT (SELECT count(*) FROM (SELECT 1 {_OPEN} LIMIT {MAX_COUNT})),
    (SELECT json_extract(question, '$.asked_at') {_OPEN} ORDER BY change LIMIT 1),
    (SELECT count(*) FROM (SELECT 1 {_PENDING} LIMIT {MAX_COUNT})),
    (SELECT created_at {_PENDING} ORDER BY number LIMIT 1)"""
COUNT_QUEUED_OF_PRINCIPAL = """SELECT count(*) FROM runs INDEXED BY runs_by_principal_and_agent
    WHERE batch_id IS NULL AND flock = ? AND principal = ? AND agent_name IN (SELECT value FROM json_each(?))
    AND status = 'starting'"""
#: The conditions of a list of runs, by parameter name.
RUN_CONDITIONS = {
    "flock": "flock = :flock",
    "agent_name": "agent_name = :agent_name",
    "principal": "principal = :principal",
    "session_id": "session_id = :session_id",
    "after": "run_id < :after",
    "low": "run_id > :low",
    "high": "run_id < :high",
}


def merged(columns: str, statuses: Iterable[str], conditions: str, also: str = "", order: str = "DESC") -> str:
    """Return a query for runs that are not items, merged with the results of the query *also*, ordered by id.

    SQLite merges the ranges of the statuses as it reads them. So no index without the status is needed, which would
    make each write slower.
    """
    is_of_agent = "agent_name = " in conditions
    index = "runs_by_both" if is_of_agent else "runs_by_status"
    if "principal = " in conditions:
        index = "runs_by_principal_and_agent" if is_of_agent else "runs_by_principal"
    if "session_id = " in conditions:
        index = "runs_by_session_and_principal" if "principal = " in conditions else "runs_by_session"
    ranges = [
        f"SELECT {columns} FROM runs INDEXED BY {index} WHERE batch_id IS NULL AND {conditions} AND status = '{status}'"
        for status in statuses
    ]
    return f"{' UNION ALL '.join([*ranges, also] if also else ranges)} ORDER BY run_id {order}"


def run_page(columns: str, statuses: Iterable[str], names: Iterable[str]) -> str:
    """Return a query for up to :limit runs, newest first. *names* are the parameters of its conditions."""
    return f"{merged(columns, statuses, ' AND '.join(RUN_CONDITIONS[name] for name in names))} LIMIT :limit"


BATCH_IDS = "SELECT batch_id FROM batches WHERE flock = :flock AND hidden IS NULL"
NTH_NEWEST = f"{merged('run_id', RunStatus, 'flock = :flock', BATCH_IDS)} LIMIT 1 OFFSET :offset"
FINAL = [status for status in RunStatus if status.is_final]
OLD = """flock = :flock AND run_id < :bound AND completed_at <= :latest
    AND run_id NOT IN (SELECT value FROM json_each(:kept))"""
OLD_RUNS = f"{merged('run_id', FINAL, OLD, order='ASC')} LIMIT :limit"

INSERT_STEP = f"""INSERT OR REPLACE INTO steps (run_id, position, {", ".join(STEP_TABLE)})
    VALUES (?, ?, {_marks(STEP_TABLE)})"""
INSERT_CALL = f"""INSERT INTO calls (run_id, position, tries, {", ".join(CALL_TABLE)})
    VALUES (?, ?, ?, {_marks(CALL_TABLE)})"""
#: An answer is stored when it is given. Its step stores its place when it receives it.
PLACE_ANSWER = """UPDATE calls SET place = ? WHERE rowid = (SELECT max(rowid) FROM calls WHERE run_id = ?
    AND position = ? AND tries = ? AND call_id = ? AND error IS NULL AND place IS NULL)"""
#: Its end replaces the start of a call that is executed at most once.
DELETE_START = "DELETE FROM calls WHERE run_id = ? AND position = ? AND call_id = ? AND once = 'started'"
#: The arguments of tools are read, since their ids are their positions. Those of other calls only appear in errors.
_READ = "iif(kind = 'tool' OR length(arguments) <= 400, arguments, x'7b7d')"
CALLS = f"""SELECT rowid, {_replaced(CALL_TABLE, arguments=_READ)} FROM calls
    WHERE run_id = ? AND position = ? AND tries = ? AND rowid > ? ORDER BY rowid"""
#: NULL in place of long values. The order is that of the rows, and that of the index.
_SHORT = {name: f"CASE WHEN length({name}) <= ? THEN {name} END" for name in ("arguments", "result")}
SHOWN_CALLS = f"""SELECT position, {_replaced(CALL_TABLE, **_SHORT)} FROM calls WHERE rowid IN
    (SELECT rowid FROM calls WHERE run_id = ? ORDER BY kind <> 'question', position, tries, rowid LIMIT ?)
    ORDER BY position, tries, rowid"""
_ASKED = f"CASE kind WHEN 'question' THEN {_SHORT['arguments']} END"
#: Some of them, with the arguments of questions only. A call has no number of its own: numbers are those of the rows
#: of a step.
NEXT_CALLS = f"""SELECT rowid, {_replaced(CALL_TABLE, **_SHORT | {"arguments": _ASKED})}
    FROM calls WHERE run_id = ? AND position = ? AND rowid > ? AND once IS NOT 'started'
    ORDER BY tries, rowid LIMIT ? OFFSET ?"""
#: Whether an engine still owns a run, or the batch of an item, in an attempt.
OWNS_RUN = """SELECT 1 FROM runs WHERE run_id = ? AND attempt = ? AND status IN ('starting', 'running')
    AND (owner = ? OR EXISTS (SELECT 1 FROM batches WHERE batches.batch_id = runs.batch_id AND batches.owner = ?))"""
ROW_OF_STEP = "SELECT rowid FROM steps WHERE run_id = ? AND position = ?"
STEPS = f"SELECT {', '.join(STEP_TABLE)} FROM steps WHERE run_id = ? ORDER BY position"
OUTLINED_STEPS = STEPS.replace("result", OUTLINED)


#: The highest position that SQLite can store.
MAX_POSITION = 2**63 - 1


def item_page(columns: str, statuses: Iterable[str], last: int = MAX_POSITION) -> str:
    """Return a query for up to :limit items of :batch_id from the position :after to *last*, in order; see ``merged``.

    The item at :after is not included.
    """
    ranges = (
        f"SELECT {columns}, position AS place FROM runs INDEXED BY items_by_status "
        f"WHERE batch_id = :batch_id AND status = '{status}' AND position > :after AND position <= {last:d}"
        for status in statuses
    )
    return f"{' UNION ALL '.join(ranges)} ORDER BY place LIMIT :limit"


def suspect_items(columns: str) -> str:
    """Return a query for the pending items of :batch_id that are suspects, after the position :after, in order."""
    return f"""SELECT {columns} FROM runs INDEXED BY runs_that_died WHERE deaths > 0 AND deaths > 1
        AND batch_id = :batch_id AND status = 'starting' AND position > :after ORDER BY position LIMIT :limit"""


def answered_items(columns: str, last: int) -> str:
    """Like ``item_page``, for the items that have run before, and got an answer."""
    return f"""SELECT {columns} FROM runs INDEXED BY items_answered WHERE batch_id = :batch_id AND status = 'starting'
        AND worked_s > 0 AND position > :after AND position <= {last:d} ORDER BY position LIMIT :limit"""


FIRST_ERROR = item_page("error", RunStatus)
ITEMS_OF = "SELECT run_id FROM runs WHERE batch_id = ? LIMIT ?"
ITEMS_TO_REOPEN = """SELECT run_id FROM runs INDEXED BY items_by_status
    WHERE batch_id = ? AND status = ? AND error_type IS NOT ? LIMIT ?"""
REOPEN_ITEMS = f"UPDATE runs SET {REOPENED} WHERE run_id IN ({ITEMS_TO_REOPEN})"
REOPEN_ITEM = f"UPDATE runs SET {REOPENED} WHERE run_id = ? AND status = ? AND error_type IS NOT ?"
TAKE_ITEMS = """UPDATE runs SET attempt = attempt + 1, recoveries = recoveries + 1, status = 'starting', worked_s = 0
    WHERE batch_id = ? AND status = 'running'"""
FAIL_ITEMS = f"{_FAIL} WHERE batch_id = ? AND status IN ('starting', 'running', 'waiting')"
#: NOT IN, so that an item with a damaged status is included.
FAIL_ITEM = f"{_FAIL} WHERE rowid = ? AND status NOT IN ('completed', 'failed', 'cancelled')"
ITEMS_BY_STATUS = "SELECT run_id FROM runs INDEXED BY items_by_status WHERE batch_id = ? AND status = ? LIMIT ?"
CANCEL_ITEMS = f"""UPDATE runs SET status = 'cancelled', error = ?, error_type = ?, completed_at = ?
    WHERE run_id IN ({ITEMS_BY_STATUS})"""
UNFINISHED_ITEMS = """SELECT rowid, CAST(run_id AS BLOB) FROM runs INDEXED BY items_by_status
    WHERE batch_id = ? AND status NOT IN ('waiting', 'completed', 'failed', 'cancelled')"""
HAS_UNFINISHED_ITEMS = "SELECT completed_items < total_items FROM batches WHERE batch_id = ?"
#: The number of items that are unfinished or being uploaded, in all batches except one.
OPEN_ITEMS = """SELECT sum(total_items - completed_items) FROM batches INDEXED BY batches_open
    WHERE flock = ? AND agent_name IN (SELECT value FROM json_each(?)) AND completed_at IS NULL
    AND ifnull(hidden, 'staged') = 'staged' AND batch_id != ?"""

BATCH_COLUMNS = ", ".join(BATCH_TABLE)
INSERT_BATCH = f"INSERT INTO batches ({BATCH_COLUMNS}, hidden) VALUES ({_marks(BATCH_TABLE)}, ?)"
FIND_BATCH = f"SELECT {BATCH_COLUMNS} FROM batches WHERE batch_id = ? AND hidden IS NULL"
FIND_STAGED_BATCH = "SELECT 1 FROM batches WHERE batch_id = ? AND hidden = 'staged'"
DELETE_BATCH = "DELETE FROM batches WHERE batch_id = ?"
COUNT_STAGED_ITEMS = "UPDATE batches SET total_items = total_items + ? WHERE batch_id = ?"
COUNT_ENDED_ITEMS = """UPDATE batches SET completed_items = completed_items + ?, failed_items = failed_items + ?,
    cancelled_items = cancelled_items + ? WHERE batch_id = ?"""
BEGIN_BATCH = """UPDATE batches SET status = 'running', started_at = ifnull(started_at, :now), resumed_at = :now,
    resumed_with = completed_items, versions = :versions WHERE batch_id = :batch_id"""
END_BATCH = """UPDATE batches SET status = ?, error = ?, error_type = ?, completed_at = ?, reopening = NULL,
    failed_items = ?, completed_items = total_items WHERE batch_id = ?"""
#: Whether items were cancelled because ``max_cost`` was spent.
HAS_UNPAID_ITEMS = """SELECT 1 FROM runs INDEXED BY items_by_status
    WHERE batch_id = ? AND status = 'cancelled' AND error_type = ? LIMIT 1"""
HAS_DIGEST = "SELECT 1 FROM runs INDEXED BY items_by_digest WHERE digest = ? AND batch_id = ?"
EQUAL_BEFORE = f"{HAS_DIGEST} AND position < ? AND attempt >= ? LIMIT 1"
DROP_DIGESTS = """UPDATE runs SET digest = NULL WHERE rowid IN (SELECT rowid FROM runs INDEXED BY items_by_status
    WHERE batch_id = ? AND status IN ('starting', 'waiting') AND digest IS NOT NULL LIMIT ?)"""
DROP_RECIPE = "UPDATE batches SET recipe = NULL WHERE batch_id = ?"
TAKE_RESULT = f"""UPDATE runs SET version_number = (SELECT {_VERSION} FROM batches
    WHERE batch_id = runs.batch_id), (status, result, error, error_type, completed_at) =
    (SELECT status, result, error, error_type, ? FROM runs WHERE rowid = ?) WHERE rowid = ? RETURNING status"""


def pending_with_equal(*, is_own: bool, are_failures_taken: bool) -> str:
    """Return a query for pending items of a batch after a position, each with the row of an equal item, or NULL."""
    equal = """(SELECT other.rowid FROM runs AS other INDEXED BY items_by_digest WHERE other.digest = runs.digest
        AND other.flock = runs.flock AND other.principal IS runs.principal AND {} LIMIT 1)"""
    if is_own:
        conditions = [
            """other.batch_id = runs.batch_id AND other.position < runs.position
            AND other.attempt >= runs.attempt AND other.status IN ('completed', 'failed', 'cancelled')"""
        ]
    else:
        statuses = ["completed", "failed"] if are_failures_taken else ["completed"]
        # Two ranges of the index, so that the equal items of the batch itself are not read.
        conditions = [
            f"other.batch_id {side} runs.batch_id AND other.status = '{status}'" for status in statuses for side in "<>"
        ]
    return f"""SELECT rowid, position, coalesce({", ".join(map(equal.format, conditions))}, NULL)
        FROM runs INDEXED BY items_by_status WHERE batch_id = ? AND status = 'starting' AND position > ?
        ORDER BY position LIMIT ?"""


#: Why a batch has ended early: the error of an item that was cancelled for that.
STOPPED_BY = """SELECT error, error_type FROM runs INDEXED BY items_by_status
    WHERE batch_id = ? AND status = 'cancelled' AND error_type NOT IN (?, ?, ?) LIMIT 1"""
CANCEL_FAILED = """UPDATE runs SET status = 'cancelled' WHERE run_id IN (SELECT value FROM json_each(?))
    AND batch_id = ? AND status = 'failed'"""
FAIL_BATCH = "UPDATE batches SET status = 'failed', error = ?, completed_at = ? WHERE batch_id = ? AND owner = ?"
TAKE_BATCH = "UPDATE batches SET owner = ? WHERE batch_id = ? AND owner = ? AND completed_at IS NULL"
REOPEN_BATCH = """UPDATE batches SET status = 'starting', attempt = attempt + 1, owner = ?, reopening = ?,
    retried_by = ?, error = NULL, error_type = NULL, completed_at = NULL, resumed_at = NULL, cancel_requested = 0
    WHERE batch_id = ?"""
SET_REOPENING = "UPDATE batches SET reopening = ? WHERE batch_id = ?"
SET_OPTIONS = "UPDATE batches SET options = ? WHERE batch_id = ?"
CANCEL_BATCH = """UPDATE batches SET cancel_requested = 1
    WHERE batch_id = ? AND hidden IS NULL AND status IN ('starting', 'running')"""
BATCHES_TO_CANCEL = """SELECT batch_id FROM batches INDEXED BY batches_open
    WHERE owner = ? AND cancel_requested = 1 AND completed_at IS NULL"""
UNFINISHED_BATCHES = """SELECT batch_id FROM batches INDEXED BY batches_open
    WHERE owner = ? AND hidden IS NULL AND completed_at IS NULL ORDER BY batch_id"""
DROP_BATCH = """UPDATE batches SET hidden = 'dropped'
    WHERE batch_id = ? AND hidden IS NULL AND status NOT IN ('starting', 'running')"""
DROP_STAGED_BATCH = "UPDATE batches SET hidden = 'dropped' WHERE batch_id = ? AND hidden = 'staged'"
DROP_STAGED_BATCHES = "UPDATE batches SET hidden = 'dropped' WHERE owner = ? AND hidden = 'staged'"
DROP_OLD_BATCHES = """UPDATE batches SET hidden = 'dropped' WHERE batch_id IN (SELECT batch_id FROM batches
    WHERE flock = :flock AND hidden IS NULL AND batch_id < :bound AND completed_at <= :latest
    AND batch_id NOT IN (SELECT value FROM json_each(:kept)) LIMIT :limit)"""
DROPPED_BATCH = "SELECT batch_id FROM batches INDEXED BY batches_hidden WHERE hidden = 'dropped' LIMIT 1"
#: The conditions of a list of batches, by parameter name.
BATCH_CONDITIONS = {
    "flock": "flock = :flock",
    "status": "status = :status",
    "agent_name": "agent_name = :agent_name",
    "principal": "principal = :principal",
    "after": "batch_id < :after",
}


def batch_page(names: Iterable[str]) -> str:
    """Return a query for up to :limit batches, newest first. *names* are the parameters of its conditions."""
    conditions = " AND ".join(BATCH_CONDITIONS[name] for name in names)
    return f"""SELECT {BATCH_COLUMNS} FROM batches WHERE hidden IS NULL AND {conditions}
        ORDER BY batch_id DESC LIMIT :limit"""


#: The answer of the last step that asked: of one that is completed, or of the current one in the same try.
FIND_ANSWER = f"""SELECT {", ".join(CALL_TABLE)} FROM calls WHERE run_id = ? AND call_id = ? AND kind = 'question'
    AND error IS NULL AND (position < ? OR tries >= ?) ORDER BY position DESC, rowid DESC"""
#: The role that may answer a question which a run has asked, even if it is no longer open; "" if it names none.
ANSWERER = "SELECT answerer FROM questions WHERE run_id = ? AND call_id = ?"
FIND_QUESTION = "SELECT question FROM questions WHERE run_id = ? AND call_id = ?"
#: For a run that ends, which keeps its ``waiting_for``. A trigger for this would make the end of each run slower.
CLOSE_QUESTIONS = "UPDATE questions SET is_open = 0 WHERE run_id = ? AND is_open = 1"
CLOSE_QUESTIONS_OF_ITEMS = f"UPDATE questions SET is_open = 0 WHERE is_open = 1 AND run_id IN ({ITEMS_BY_STATUS})"
NEWEST_CHANGE = "SELECT newest FROM question_changes"
#: The conditions of a list of questions, by parameter name.
QUESTION_CONDITIONS = {name: f"{name} = :{name}" for name in ("agent_name", "principal", "session_id")}


#: Of more roles, the questions are sorted. SQLite merges at most 500 queries, and each costs time.
MAX_MERGED_ROLES = 100


def open_questions(roles: Collection[str] | None, owner: str | None, names: Iterable[str]) -> str:
    """Return a query for open questions, the newest run first.

    Args:
        roles: parameters of the roles that they name, which are also a JSON list in :roles; None means any role.
        owner: the parameter of the owner of those that name none: "" for any owner; None to leave them out.
        names: the other parameters of its conditions.
    """
    named = [f"answerer = :{role}" for role in roles or ()]
    if len(named) > MAX_MERGED_ROLES:
        named = ["answerer IN (SELECT value FROM json_each(:roles))"]
    ranges = [("questions_open", f"is_open = 1 AND {condition}") for condition in named]
    if roles is None:
        ranges.append(("questions_open", "is_open = 1"))
    elif owner:
        ranges.append(("questions_of_owners", f"is_open = 1 AND principal = :{owner} AND answerer = ''"))
    elif owner is not None:
        ranges.append(("questions_open", "is_open = 1 AND answerer = ''"))
    selects = [_questions(index, range_, names) for index, range_ in ranges]
    return f"{' UNION ALL '.join(selects)} ORDER BY run_id DESC"


def changed_questions(names: Iterable[str]) -> str:
    """Return a query for the questions that were asked or closed after the change :since, in that order.

    Args:
        names: the other parameters of its conditions.
    """
    return f"{_questions('questions_changed', 'change > :since', names)} ORDER BY change"


def _questions(index: str, range_: str, names: Iterable[str]) -> str:
    also = [QUESTION_CONDITIONS[name] for name in names]
    conditions = " AND ".join(["flock = :flock", range_, "run_id < :after", *also])
    return f"""SELECT run_id, agent_name, session_id, principal, retried_by, question, is_open, change
        FROM questions INDEXED BY {index} WHERE {conditions}"""


#: The answer of a wait that was given while the step runs.
FIND_ANSWER_OF_WAIT = f"""SELECT {", ".join(CALL_TABLE)} FROM calls
    WHERE run_id = ? AND position = ? AND tries = ? AND call_id = ? AND error IS NULL"""
INSERT_MESSAGE = "INSERT INTO messages (run_id, name, message, sent_at) VALUES (?, ?, ?, ?)"
NEXT_MESSAGE = "SELECT rowid, message FROM messages WHERE run_id = ? AND name = ? ORDER BY rowid LIMIT 1"
DELETE_MESSAGE = "DELETE FROM messages WHERE rowid = ?"
COUNT_MESSAGES = "SELECT count(*) FROM messages WHERE run_id = ?"
NAMES_OF_MESSAGES = "SELECT DISTINCT name FROM messages WHERE run_id = ? ORDER BY name"
RELEASED_FILES = "SELECT file, at FROM run_files WHERE run_id = '' LIMIT ?"
FORGET_RELEASED_FILE = "DELETE FROM run_files WHERE run_id = '' AND file = ? AND at <= ?"
HAS_RUN_WITH_FILE = "SELECT 1 FROM run_files WHERE file = ? AND run_id != ''"
FIND_KEY = "SELECT fingerprint, made_id FROM idempotency_keys WHERE flock = ? AND key = ?"
INSERT_KEY = "INSERT INTO idempotency_keys VALUES (?, ?, ?, ?, ?)"
DELETE_KEYS_OF = "DELETE FROM idempotency_keys WHERE made_id = ?"
DELETE_OLD_KEYS = "DELETE FROM idempotency_keys WHERE created_at < ?"


#: See ``flock.store.jobs``. A call is open if it has no reply, and new if it is in no job either.
_OPEN_OF_JOB = "FROM model_calls WHERE job_id = ? AND reply IS NULL"
_NEW_OF_BATCH = "FROM model_calls WHERE batch_id = ? AND job_id IS NULL AND reply IS NULL"
_WAITS = "EXISTS (SELECT 1 FROM runs WHERE runs.run_id = model_calls.run_id AND status = 'waiting')"
JOBS = """SELECT job_id, target, provider_id, is_cancelled, created_at FROM model_jobs
    WHERE batch_id = ? ORDER BY created_at, job_id"""
NEW_CALLS = f"""SELECT count(*), min(created_at) FROM
    (SELECT created_at {_NEW_OF_BATCH} ORDER BY created_at LIMIT ?)"""
HELD = """SELECT job_id, sum(cost), count(*) FROM model_jobs JOIN model_calls USING (job_id)
    WHERE model_jobs.batch_id = ? AND reply IS NULL GROUP BY job_id"""
FIRST_NEW_CALL = f"SELECT target {_NEW_OF_BATCH} AND {_WAITS} ORDER BY created_at LIMIT 1"
CALLS_FOR_JOB = f"""SELECT rowid, model, size, max_tokens {_NEW_OF_BATCH} AND target = ? AND {_WAITS}
    ORDER BY created_at LIMIT ?"""
#: An item that does not wait stores its call again if it needs the reply.
DROP_NEW_CALLS = f"DELETE FROM model_calls WHERE rowid IN (SELECT rowid {_NEW_OF_BATCH} AND NOT {_WAITS} LIMIT ?)"
INSERT_JOB = "INSERT INTO model_jobs (job_id, batch_id, target, created_at) VALUES (?, ?, ?, ?)"
PUT_CALL_INTO_JOB = "UPDATE model_calls SET job_id = ?, cost = ? WHERE rowid = ?"
SIZE_OF_JOB = f"SELECT count(*), total(size) {_OPEN_OF_JOB}"
LINES_OF_JOB = f"SELECT custom_id, line {_OPEN_OF_JOB} AND custom_id > ? ORDER BY custom_id"
SET_PROVIDER_ID = "UPDATE model_jobs SET provider_id = ? WHERE job_id = ?"
CANCEL_JOB = "UPDATE model_jobs SET is_cancelled = 1 WHERE job_id = ?"
FIND_CALL_OF_JOB = f"SELECT run_id, call_id, agent_name {_OPEN_OF_JOB} AND custom_id = ?"
REST_OF_JOB = f"SELECT custom_id {_OPEN_OF_JOB} LIMIT ?"
TAKE_CALLS_FROM_JOB = f"""UPDATE model_calls SET job_id = NULL
    WHERE rowid IN (SELECT rowid {_OPEN_OF_JOB} AND {_WAITS} LIMIT ?)"""
DROP_CALLS_OF_JOB = f"DELETE FROM model_calls WHERE rowid IN (SELECT rowid {_OPEN_OF_JOB} LIMIT ?)"
DELETE_JOB = "DELETE FROM model_jobs WHERE job_id = ?"
FIND_MODEL_CALL = "SELECT digest, reply FROM model_calls WHERE run_id = ? AND call_id = ?"
INSERT_MODEL_CALL = """INSERT OR REPLACE INTO model_calls (run_id, call_id, custom_id, batch_id, agent_name, target,
    model, max_tokens, digest, size, line, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
KEEP_REPLY = "UPDATE model_calls SET reply = ? WHERE run_id = ? AND call_id = ?"
DELETE_MODEL_CALL = "DELETE FROM model_calls WHERE run_id = ? AND call_id = ?"


def _report(values: str, record: str, tables: str = "") -> str:
    """Return the statement for a webhook of a record, if its agent has a receiver."""
    return f"""INSERT INTO webhooks (type, record_id, call_id, created_at, next_try_at, flock, agent_name, attempt)
        SELECT {values}, url.flock, url.agent_name, {record}.attempt FROM {tables}webhook_urls AS url
        WHERE url.flock = {record}.flock AND url.agent_name = {record}.agent_name"""


_AT = "ifnull(new.completed_at, CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER))"
_REPORTS = {
    kind: _report(f"'{kind}.' || new.status, new.{kind}_id, NULL, {_AT}, {_AT}", "new") for kind in ("run", "batch")
}
_HAS_ENDED = "new.status IN ('completed', 'failed', 'cancelled')"
#: They exist in a store whose agents have a receiver, since they make the end of each run slower. A short run ends
#: with its first write, which is repeated if a commit has failed.
WEBHOOK_TRIGGERS = {
    "webhooks_of_new_runs": f"""AFTER INSERT ON runs
        WHEN new.batch_id IS NULL AND {_HAS_ENDED} BEGIN {_REPORTS["run"]}
        AND NOT EXISTS (SELECT 1 FROM webhooks WHERE record_id = new.run_id AND attempt = new.attempt); END""",
    "webhooks_of_runs": f"""AFTER UPDATE OF status ON runs
        WHEN new.status IS NOT old.status AND new.batch_id IS NULL
        AND ({_HAS_ENDED} OR (new.status = 'waiting' AND new.is_asleep = 0)) BEGIN {_REPORTS["run"]}; END""",
    "webhooks_of_batches": f"""AFTER UPDATE OF status ON batches
        WHEN new.status IS NOT old.status AND {_HAS_ENDED} BEGIN {_REPORTS["batch"]}; END""",
}
_OF_QUESTION = _report("'question.expired', runs.run_id, ?, ?, ?", "runs", "runs, ")
QUESTION_EXPIRED = f"{_OF_QUESTION} AND runs.run_id = ? AND runs.batch_id IS NULL"
UNDO_WAITING_WEBHOOK = "DELETE FROM webhooks WHERE type = 'run.waiting' AND record_id = ? AND number > ?"
LAST_WEBHOOK = "SELECT ifnull(max(number), 0) FROM webhooks WHERE record_id = ?"
HAS_WEBHOOK_URLS = "SELECT 1 FROM webhook_urls"
WEBHOOK_URLS = "SELECT agent_name, url, engine_id FROM webhook_urls WHERE flock = ?"
SET_WEBHOOK_URL = "INSERT OR REPLACE INTO webhook_urls VALUES (?, ?, ?, ?)"
DELETE_WEBHOOK_URL = "DELETE FROM webhook_urls WHERE flock = ? AND agent_name = ?"
WEBHOOK_SENDER = "SELECT engine_id FROM webhook_senders WHERE flock = ?"
#: If several processes find the last sender dead, only one replaces it.
SET_WEBHOOK_SENDER = """INSERT INTO webhook_senders VALUES (?, ?)
    ON CONFLICT DO UPDATE SET engine_id = excluded.engine_id WHERE engine_id IS ?"""
_URL = """(SELECT url FROM webhook_urls
    WHERE webhook_urls.flock = webhooks.flock AND webhook_urls.agent_name = webhooks.agent_name)"""
_WEBHOOKS = f"SELECT {_replaced(WEBHOOK_TABLE, url=_URL)} FROM webhooks"


def due_webhooks(when: str, columns: str = "") -> str:
    """Return a query for those of one agent, and of each record only the earliest. *when*: a comparison."""
    return f"""{_WEBHOOKS.replace("SELECT ", f"SELECT {columns}", 1)} INDEXED BY webhooks_pending
        WHERE flock = ? AND status = 'pending' AND agent_name = ? AND next_try_at {when} AND NOT EXISTS
        (SELECT 1 FROM webhooks AS earlier WHERE earlier.record_id = webhooks.record_id
        AND earlier.number < webhooks.number AND earlier.status = 'pending') ORDER BY next_try_at LIMIT ?"""


GIVE_UP_WEBHOOK = "UPDATE webhooks SET status = 'given_up', ended_at = ?, error = ? WHERE number = ?"
FIND_WEBHOOK = f"{_WEBHOOKS} WHERE webhook_id = ? AND flock = ?"
UPDATE_WEBHOOK = """UPDATE webhooks SET status = ?, tries = ?, first_try_at = ?, next_try_at = ?, ended_at = ?,
    error = ? WHERE webhook_id = ? AND (status = 'pending' AND tries = ? OR ? IS NULL)"""
#: If a receiver is down, all webhooks that wait for it have failed.
WEBHOOKS_TO_FAIL = """SELECT number FROM webhooks INDEXED BY webhooks_down WHERE flock = :flock
    AND status = 'pending' AND agent_name IN (SELECT value FROM json_each(CAST(:agents AS TEXT)))
    AND ifnull(first_try_at, 0) < :given_up AND next_try_at <= :now LIMIT :limit"""
FAIL_WEBHOOKS = f"""UPDATE webhooks SET first_try_at = ifnull(first_try_at, :now), error = :error,
    status = iif(first_try_at < :given_up, 'given_up', 'pending'), ended_at = iif(first_try_at < :given_up, :now, NULL)
    WHERE number IN ({WEBHOOKS_TO_FAIL}) RETURNING status"""
GIVE_UP_WEBHOOKS = """UPDATE webhooks SET status = 'given_up', ended_at = ?, error = ? WHERE number IN
    (SELECT number FROM webhooks WHERE flock = ? AND status = 'pending' AND agent_name = ? LIMIT ?)"""
OLD_WEBHOOKS = "SELECT number FROM webhooks INDEXED BY webhooks_ended WHERE ended_at < ? LIMIT ?"
DELETE_OLD_WEBHOOKS = f"DELETE FROM webhooks WHERE number IN ({OLD_WEBHOOKS})"


def webhook_page(status: str | None, after: str | None) -> str:
    """Return a query for up to :limit webhooks, newest first."""
    before = "number < (SELECT number FROM webhooks WHERE webhook_id = :after)"
    conditions = ["flock = :flock", *(["status = :status"] if status else []), *([before] if after else [])]
    return f"{_WEBHOOKS} WHERE {' AND '.join(conditions)} ORDER BY number DESC LIMIT :limit"


FIND_ENGINE = "SELECT 1 FROM engines WHERE engine_id = ?"
OTHER_ENGINES = "SELECT engine_id FROM engines WHERE flock = ? AND engine_id != ?"
ALL_ENGINES = "SELECT engine_id FROM engines"
INSERT_ENGINE = "INSERT INTO engines VALUES (?, ?, ?)"
DELETE_ENGINE = "DELETE FROM engines WHERE engine_id = ?"
#: A write without effect, to test whether the file can be written.
TOUCH_ENGINES = "UPDATE engines SET started_at = started_at"
#: Other flocks that may have unfinished work. Such work always belongs to a registered engine.
OTHER_FLOCKS = "SELECT DISTINCT flock FROM engines WHERE flock != ?"
COUNT_UNFINISHED = """SELECT (SELECT count(*) FROM runs INDEXED BY runs_by_status WHERE batch_id IS NULL
    AND flock = :flock AND status IN ('starting', 'running')) + (SELECT count(*) FROM batches
    INDEXED BY batches_open WHERE flock = :flock AND completed_at IS NULL AND hidden IS NULL)"""
PROGRAM_OF_FLOCK = "SELECT agents FROM flocks WHERE flock = ?"
SET_PROGRAM_OF_FLOCK = """INSERT INTO flocks (flock, agents, secret) VALUES (?, ?, ?) ON CONFLICT (flock)
    DO UPDATE SET agents = excluded.agents, secret = ifnull(secret, excluded.secret)"""
SECRET_OF_FLOCK = "SELECT secret FROM flocks WHERE flock = ?"
