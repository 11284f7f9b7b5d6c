-- The tables of the store, and their migrations: each begins with a line that starts with four dashes. They are applied
-- in order, each once. ``user_version`` of the file counts them. Never change a released one.

----
CREATE TABLE runs (
    run_id TEXT PRIMARY KEY,
    flock TEXT NOT NULL,
    agent_name TEXT NOT NULL,
    status TEXT NOT NULL,
    error_type TEXT,
    created_at INTEGER NOT NULL,
    started_at INTEGER,
    completed_at INTEGER,
    request_id TEXT,
    batch_id TEXT,
    position INTEGER,
    is_async INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    timeout_s REAL,
    owner TEXT,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    progress BLOB,
    error TEXT,
    inputs BLOB NOT NULL, -- long values come last, because columns after them are slow to read
    result BLOB
);
-- With any filter, a page of GET /runs reads one range per status of one of these indexes; see run_page.
CREATE INDEX runs_by_status ON runs (flock, status, run_id) WHERE batch_id IS NULL;
CREATE INDEX runs_by_both ON runs (flock, agent_name, status, run_id) WHERE batch_id IS NULL;
CREATE UNIQUE INDEX items ON runs (batch_id, position) WHERE batch_id IS NOT NULL;
CREATE INDEX cancels ON runs (owner) WHERE cancel_requested = 1 AND status IN ('starting', 'running');
CREATE INDEX runs_active ON runs (owner) WHERE status IN ('starting', 'running');
CREATE TABLE steps (
    run_id TEXT NOT NULL,
    position INTEGER NOT NULL,
    agent_name TEXT NOT NULL,
    result BLOB NOT NULL,
    next_agent TEXT,
    usage BLOB,
    attempt INTEGER NOT NULL,
    started_at INTEGER NOT NULL,
    completed_at INTEGER NOT NULL,
    PRIMARY KEY (run_id, position)
);
CREATE TABLE batches (
    batch_id TEXT PRIMARY KEY,
    flock TEXT NOT NULL,
    agent_name TEXT NOT NULL,
    options BLOB NOT NULL,
    status TEXT NOT NULL,
    total_items INTEGER NOT NULL,
    completed_items INTEGER NOT NULL DEFAULT 0,
    failed_items INTEGER NOT NULL DEFAULT 0,
    cancelled_items INTEGER NOT NULL DEFAULT 0,
    error TEXT,
    created_at INTEGER NOT NULL,
    started_at INTEGER,
    completed_at INTEGER,
    request_id TEXT,
    owner TEXT
);
CREATE TABLE engines (engine_id TEXT PRIMARY KEY, flock TEXT NOT NULL, started_at INTEGER NOT NULL);
CREATE TABLE idempotency_keys (
    flock TEXT NOT NULL,
    key TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    made_id TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (flock, key)
) WITHOUT ROWID;
CREATE INDEX keys_by_what_they_made ON idempotency_keys (made_id);

----
ALTER TABLE runs ADD COLUMN traceparent TEXT;

----
ALTER TABLE runs ADD COLUMN principal TEXT;
ALTER TABLE batches ADD COLUMN principal TEXT;
-- It costs nothing without API keys.
CREATE INDEX runs_by_principal ON runs (flock, principal, status, run_id)
    WHERE batch_id IS NULL AND principal IS NOT NULL;

---- Fence items by the owner of their batch, so that a million of them can be taken over at once.
ALTER TABLE runs ADD COLUMN last_step BLOB;
ALTER TABLE batches ADD COLUMN attempt INTEGER NOT NULL DEFAULT 1;
ALTER TABLE batches ADD COLUMN cancel_requested INTEGER NOT NULL DEFAULT 0;
ALTER TABLE batches ADD COLUMN reopening TEXT;
ALTER TABLE batches ADD COLUMN resumed_at INTEGER;
ALTER TABLE batches ADD COLUMN resumed_with INTEGER NOT NULL DEFAULT 0;
-- Why a batch is hidden: "staged" until its last item is written, "dropped" until its last item is deleted.
ALTER TABLE batches ADD COLUMN hidden TEXT;
CREATE INDEX batches_hidden ON batches (hidden) WHERE hidden IS NOT NULL;
-- Few batches are open. The query for cancellations, 20 times a second, reads only those.
CREATE INDEX batches_open ON batches (flock, owner) WHERE completed_at IS NULL;
-- A page of items reads one range of it per status; see item_page.
CREATE INDEX items_by_status ON runs (batch_id, status, position) WHERE batch_id IS NOT NULL;
DROP INDEX items;
DROP INDEX runs_active;
CREATE INDEX runs_active ON runs (owner) WHERE batch_id IS NULL AND status IN ('starting', 'running');

----
ALTER TABLE runs ADD COLUMN recoveries INTEGER NOT NULL DEFAULT 0;

----
ALTER TABLE runs ADD COLUMN extra BLOB;
ALTER TABLE batches ADD COLUMN extra_names BLOB;

---- The ``Program`` of a flock when it was last started, as JSON.
CREATE TABLE flocks (flock TEXT PRIMARY KEY, agents TEXT NOT NULL) WITHOUT ROWID;

----
CREATE INDEX runs_by_principal_and_agent ON runs (flock, principal, agent_name, status, run_id)
    WHERE batch_id IS NULL AND principal IS NOT NULL;

---- The finished calls of steps, in the order in which they finished; ``tries`` is ``Run.tries``.
CREATE TABLE calls (
    run_id TEXT NOT NULL,
    position INTEGER NOT NULL,
    tries INTEGER NOT NULL,
    call_id TEXT NOT NULL,
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    arguments BLOB NOT NULL,
    result BLOB NOT NULL,
    error TEXT,
    error_type TEXT,
    usage BLOB,
    started_at INTEGER NOT NULL,
    completed_at INTEGER NOT NULL
);
CREATE INDEX calls_of_steps ON calls (run_id, position, tries);
ALTER TABLE steps ADD COLUMN call_count INTEGER NOT NULL DEFAULT 0;

----
ALTER TABLE runs ADD COLUMN session_id TEXT;
-- They cost nothing without sessions.
CREATE INDEX runs_by_session ON runs (flock, session_id, status, run_id)
    WHERE batch_id IS NULL AND session_id IS NOT NULL;
CREATE INDEX runs_by_session_and_principal ON runs (flock, session_id, principal, status, run_id)
    WHERE batch_id IS NULL AND session_id IS NOT NULL;
-- Its last column is the rowid, the order of acceptance; see ACTIVE_BEFORE.
CREATE INDEX sessions_active ON runs (flock, session_id, principal)
    WHERE session_id IS NOT NULL AND status IN ('starting', 'running');

---- Runs that wait for the answers of people.
ALTER TABLE runs ADD COLUMN waiting_for BLOB;
ALTER TABLE runs ADD COLUMN expires_at INTEGER;
ALTER TABLE runs ADD COLUMN worked_s REAL NOT NULL DEFAULT 0;
ALTER TABLE batches ADD COLUMN waiting_items INTEGER NOT NULL DEFAULT 0;
CREATE INDEX runs_expiring ON runs (flock, expires_at) WHERE status = 'waiting' AND expires_at IS NOT NULL;

---- Which model answered.
ALTER TABLE steps ADD COLUMN model TEXT;
ALTER TABLE calls ADD COLUMN model TEXT;

---- What runs and batches have spent. NULL in older rows, whose failed steps were not counted.
ALTER TABLE runs ADD COLUMN spent BLOB;
ALTER TABLE runs ADD COLUMN max_cost REAL;
ALTER TABLE batches ADD COLUMN usage BLOB;
ALTER TABLE batches ADD COLUMN error_type TEXT;
ALTER TABLE batches ADD COLUMN invalid_items INTEGER NOT NULL DEFAULT 0;

---- Runs that may have killed their process.
ALTER TABLE runs ADD COLUMN deaths INTEGER NOT NULL DEFAULT 0;
ALTER TABLE runs ADD COLUMN deaths_alone INTEGER NOT NULL DEFAULT 0;
CREATE INDEX runs_that_died ON runs (batch_id) WHERE deaths > 0;

---- The exceptions of calls. NULL in older rows, whose calls are executed again.
ALTER TABLE calls ADD COLUMN raised BLOB;

---- In which order they started and ended. NULL for answers, and in older rows.
ALTER TABLE calls ADD COLUMN place BLOB;

---- How the ids of calls are made: runs that are in the store already keep theirs.
ALTER TABLE runs ADD COLUMN call_ids INTEGER NOT NULL DEFAULT 1;

---- Calls that are executed at most once: "started" or "ended".
ALTER TABLE calls ADD COLUMN once TEXT;

---- What a retry keeps of the calls of earlier attempts.
ALTER TABLE runs ADD COLUMN journal INTEGER;
ALTER TABLE runs ADD COLUMN dropped BLOB;
ALTER TABLE runs ADD COLUMN earlier_error TEXT;

---- Messages to runs that have not received them. A waiting run that asks nobody is asleep.
CREATE TABLE messages (run_id TEXT NOT NULL, name TEXT NOT NULL, message BLOB NOT NULL, sent_at INTEGER NOT NULL);
CREATE INDEX messages_of_runs ON messages (run_id, name);
ALTER TABLE runs ADD COLUMN is_asleep INTEGER NOT NULL DEFAULT 0;
CREATE INDEX runs_asking ON runs (flock, run_id, agent_name)
    WHERE batch_id IS NULL AND status = 'waiting' AND is_asleep = 0;

---- All questions that runs have asked, in their order. The trigger keeps them equal to ``waiting_for``, whichever
-- statement writes that.
CREATE TABLE questions (
    run_id TEXT NOT NULL,
    call_id TEXT NOT NULL,
    flock TEXT NOT NULL,
    answerer TEXT NOT NULL,
    is_open INTEGER NOT NULL DEFAULT 1,
    question TEXT NOT NULL,
    agent_name TEXT NOT NULL,
    session_id TEXT,
    principal TEXT,
    retried_by BLOB
);
ALTER TABLE runs ADD COLUMN retried_by BLOB;
CREATE UNIQUE INDEX questions_of_runs ON questions (run_id, call_id);
CREATE INDEX questions_open ON questions (flock, answerer, run_id) WHERE is_open = 1;
CREATE INDEX questions_of_owners ON questions (flock, principal, run_id) WHERE is_open = 1 AND answerer = '';
INSERT INTO questions (run_id, call_id, flock, answerer, question, agent_name, session_id, principal, retried_by)
    SELECT runs.run_id, json_extract(value, '$.call_id'), runs.flock, ifnull(json_extract(value, '$.answerer'), ''),
        value, runs.agent_name, runs.session_id, runs.principal, runs.retried_by
    FROM runs, json_each(CAST(runs.waiting_for AS TEXT))
    WHERE json_valid(CAST(runs.waiting_for AS TEXT)) AND json_extract(value, '$.kind') IS NULL
    AND runs.status IN ('starting', 'running', 'waiting');
CREATE TRIGGER questions_asked AFTER UPDATE OF waiting_for ON runs
    WHEN new.waiting_for IS NOT old.waiting_for BEGIN
    UPDATE questions SET is_open = 0 WHERE run_id = new.run_id AND is_open = 1 AND call_id NOT IN
        (SELECT json_extract(value, '$.call_id') FROM json_each(CAST(ifnull(new.waiting_for, '[]') AS TEXT)));
    INSERT INTO questions (run_id, call_id, flock, answerer, question, agent_name, session_id, principal, retried_by)
        SELECT new.run_id, json_extract(value, '$.call_id'), new.flock, ifnull(json_extract(value, '$.answerer'), ''),
            value, new.agent_name, new.session_id, new.principal, new.retried_by
        FROM json_each(CAST(new.waiting_for AS TEXT))
        WHERE json_valid(CAST(new.waiting_for AS TEXT)) AND json_extract(value, '$.kind') IS NULL
        ON CONFLICT (run_id, call_id) DO UPDATE SET is_open = 1;
END;

---- The principals who answered and retried.
ALTER TABLE calls ADD COLUMN answered_by TEXT;
ALTER TABLE calls ADD COLUMN four_eyes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE batches ADD COLUMN retried_by BLOB;

---- For whom a run acts, if that is more than a name.
ALTER TABLE runs ADD COLUMN caller BLOB;

---- The key of the ids of calls whose arguments are secret. Runs that are in the store already have none.
ALTER TABLE runs ADD COLUMN call_key TEXT NOT NULL DEFAULT '';

---- What principals have spent, by day, and what each may spend in a day.
ALTER TABLE runs ADD COLUMN spent_by BLOB;
CREATE TABLE usage (
    flock TEXT NOT NULL,
    day INTEGER NOT NULL, -- as in date.toordinal
    principal TEXT NOT NULL, -- '' for requests without one
    agent_name TEXT NOT NULL,
    model TEXT NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    reasoning_tokens INTEGER NOT NULL,
    estimated_tokens INTEGER NOT NULL,
    picodollars INTEGER NOT NULL,
    priced_tokens INTEGER NOT NULL,
    PRIMARY KEY (flock, day, principal, agent_name, model)
) WITHOUT ROWID;
CREATE TABLE budgets (
    flock TEXT NOT NULL,
    principal TEXT NOT NULL,
    max_cost REAL NOT NULL,
    PRIMARY KEY (flock, principal)
) WITHOUT ROWID;

---- Each question has the number of its last change, so that what is new is read without the rest.
ALTER TABLE questions ADD COLUMN change INTEGER NOT NULL DEFAULT 0;
CREATE TABLE question_changes (newest INTEGER NOT NULL);
INSERT INTO question_changes VALUES (0);
CREATE INDEX questions_changed ON questions (flock, change);
CREATE TRIGGER question_asked AFTER INSERT ON questions BEGIN
    UPDATE question_changes SET newest = newest + 1;
    UPDATE questions SET change = (SELECT newest FROM question_changes) WHERE rowid = new.rowid;
END;
CREATE TRIGGER question_opened_or_closed AFTER UPDATE OF is_open ON questions
    WHEN new.is_open IS NOT old.is_open BEGIN
    UPDATE question_changes SET newest = newest + 1;
    UPDATE questions SET change = (SELECT newest FROM question_changes) WHERE rowid = new.rowid;
END;
UPDATE questions SET is_open = 0 WHERE is_open = 1 AND NOT EXISTS (SELECT 1 FROM runs
    WHERE runs.run_id = questions.run_id AND status IN ('starting', 'running', 'waiting'));

---- What clients bring to their runs. The calls of their tools are questions too, which no list of questions finds.
ALTER TABLE runs ADD COLUMN client BLOB;
-- No role has the name ' client'.
CREATE TRIGGER client_tools_called AFTER UPDATE OF waiting_for ON runs
    WHEN new.waiting_for IS NOT old.waiting_for BEGIN
    INSERT INTO questions (run_id, call_id, flock, answerer, question, agent_name, session_id, principal, retried_by)
        SELECT new.run_id, json_extract(value, '$.call_id'), new.flock, ' client',
            value, new.agent_name, new.session_id, new.principal, new.retried_by
        FROM json_each(CAST(new.waiting_for AS TEXT))
        WHERE json_valid(CAST(new.waiting_for AS TEXT)) AND json_extract(value, '$.kind') = 'client_tool'
        ON CONFLICT (run_id, call_id) DO UPDATE SET is_open = 1;
END;

---- Items with equal inputs; see ``flock.store.equals``.
ALTER TABLE runs ADD COLUMN digest TEXT;
ALTER TABLE batches ADD COLUMN recipe TEXT;
CREATE INDEX items_by_digest ON runs (digest, batch_id) WHERE digest IS NOT NULL;

---- The key of a flock, which its processes share.
ALTER TABLE flocks ADD COLUMN secret TEXT;

----
ALTER TABLE runs ADD COLUMN first_span TEXT;

---- What happened to runs and batches, for the receivers that agents have; see ``flock.store.webhooks``.
-- Its number is the order in which they happened. ``record_id`` is that of the run or the batch.
CREATE TABLE webhooks (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    webhook_id TEXT NOT NULL DEFAULT ('msg_' || lower(hex(randomblob(12)))),
    flock TEXT NOT NULL, type TEXT NOT NULL, record_id TEXT NOT NULL, call_id TEXT, agent_name TEXT NOT NULL,
    attempt INTEGER NOT NULL, status TEXT NOT NULL DEFAULT 'pending', tries INTEGER NOT NULL DEFAULT 0,
    created_at INTEGER NOT NULL, next_try_at INTEGER NOT NULL, first_try_at INTEGER, ended_at INTEGER,
    error TEXT);
CREATE UNIQUE INDEX webhooks_by_id ON webhooks (webhook_id);
CREATE INDEX webhooks_of_records ON webhooks (record_id, number);
CREATE INDEX webhooks_by_status ON webhooks (flock, status, number);
CREATE INDEX webhooks_pending ON webhooks (flock, agent_name, next_try_at) WHERE status = 'pending';
CREATE INDEX webhooks_ended ON webhooks (ended_at) WHERE ended_at IS NOT NULL;
CREATE TABLE webhook_urls (flock TEXT NOT NULL, agent_name TEXT NOT NULL, url TEXT NOT NULL,
    PRIMARY KEY (flock, agent_name)) WITHOUT ROWID;
CREATE TABLE webhook_senders (flock TEXT PRIMARY KEY, engine_id TEXT NOT NULL) WITHOUT ROWID;

---- Which calls of a step counted when it ended.
ALTER TABLE steps ADD COLUMN first_try INTEGER NOT NULL DEFAULT 1;

---- Which runs have a file. An empty ``run_id`` is for one that a deleted run had, which it took at this time. SQLite
-- knows the time to a millisecond.
ALTER TABLE runs ADD COLUMN files BLOB;
CREATE TABLE run_files (run_id TEXT, file TEXT, at REAL, PRIMARY KEY (run_id, file)) WITHOUT ROWID;
CREATE INDEX runs_by_file ON run_files (file);
CREATE TRIGGER files_taken AFTER INSERT ON runs WHEN new.files IS NOT NULL BEGIN
    INSERT OR REPLACE INTO run_files
    SELECT new.run_id, value, (julianday('now') - 2440587.5) * 86400 + 0.002
    FROM json_each(iif(json_valid(CAST(new.files AS TEXT)), CAST(new.files AS TEXT), '[]'));
END;
CREATE TRIGGER files_released AFTER DELETE ON runs WHEN old.files IS NOT NULL BEGIN
    INSERT OR REPLACE INTO run_files
    SELECT '', file, max(at) FROM run_files WHERE run_id IN (old.run_id, '')
    AND file IN (SELECT value FROM
            json_each(iif(json_valid(CAST(old.files AS TEXT)), CAST(old.files AS TEXT), '[]'))) GROUP BY file;
    DELETE FROM run_files WHERE run_id = old.run_id;
END;

---- Rows of a batch's table that have no value.
ALTER TABLE batches ADD COLUMN skipped_rows INTEGER;

---- Who has set the receiver of an agent, and webhooks whose receiver may be down.
ALTER TABLE webhook_urls ADD COLUMN engine_id TEXT;
CREATE INDEX webhooks_down ON webhooks (flock, agent_name, ifnull(first_try_at, 0)) WHERE status = 'pending';

---- Which versions of its agent have executed a batch.
ALTER TABLE batches ADD COLUMN versions BLOB;
ALTER TABLE runs ADD COLUMN version_number INTEGER;

---- Calls of models in the batch endpoints of providers; see ``flock.store.jobs``. A call without a job is new.
CREATE TABLE model_jobs (
    job_id TEXT PRIMARY KEY, batch_id TEXT NOT NULL, target TEXT NOT NULL, provider_id TEXT,
    is_cancelled INTEGER NOT NULL DEFAULT 0, created_at INTEGER NOT NULL);
CREATE INDEX model_jobs_of_batches ON model_jobs (batch_id);
CREATE TABLE model_calls (
    run_id TEXT NOT NULL, call_id TEXT NOT NULL, custom_id TEXT NOT NULL, batch_id TEXT NOT NULL,
    agent_name TEXT NOT NULL, target TEXT NOT NULL, model TEXT NOT NULL, max_tokens INTEGER,
    digest TEXT NOT NULL, size INTEGER NOT NULL, created_at INTEGER NOT NULL,
    job_id TEXT, cost INTEGER NOT NULL DEFAULT 0, reply BLOB, line BLOB NOT NULL);
CREATE INDEX items_answered ON runs (batch_id, position)
    WHERE batch_id IS NOT NULL AND status = 'starting' AND worked_s > 0;
CREATE UNIQUE INDEX model_calls_of_runs ON model_calls (run_id, call_id);
CREATE INDEX model_calls_new ON model_calls (batch_id, created_at) WHERE job_id IS NULL AND reply IS NULL;
CREATE INDEX model_calls_of_jobs ON model_calls (job_id, custom_id, cost, size) WHERE reply IS NULL;
CREATE TRIGGER model_calls_dropped AFTER UPDATE OF status ON runs
    WHEN old.status = 'waiting' AND new.status IN ('failed', 'cancelled') BEGIN
    DELETE FROM model_calls WHERE run_id = new.run_id AND job_id IS NULL AND reply IS NULL;
END;
CREATE TRIGGER model_jobs_deleted AFTER DELETE ON batches BEGIN
    DELETE FROM model_jobs WHERE batch_id = old.batch_id;
END;

---- Without the times since when.
UPDATE batches SET versions =
    (SELECT CAST(json_group_array(json_extract(value, '$.version')) AS BLOB) FROM json_each(CAST(versions AS TEXT)))
    WHERE json_valid(CAST(versions AS TEXT));

---- Lists show the principal of each run, which is stored after its result, so the indexes have it too.
DROP INDEX IF EXISTS runs_by_status;
DROP INDEX IF EXISTS runs_by_both;
DROP INDEX IF EXISTS runs_by_session;
CREATE INDEX runs_by_status ON runs (flock, status, run_id, principal) WHERE batch_id IS NULL;
CREATE INDEX runs_by_both ON runs (flock, agent_name, status, run_id, principal) WHERE batch_id IS NULL;
CREATE INDEX runs_by_session ON runs (flock, session_id, status, run_id, principal)
    WHERE batch_id IS NULL AND session_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS batches_by_principal ON batches (flock, principal, batch_id) WHERE hidden IS NULL;

---- The open questions in the order in which they were asked.
CREATE INDEX IF NOT EXISTS questions_by_age ON questions (flock, change) WHERE is_open = 1;
