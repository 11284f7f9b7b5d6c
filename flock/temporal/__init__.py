"""The same API on more than one machine: runs are workflows on a Temporal cluster, and workers execute them.

There are three kinds of processes. API processes have a ``TemporalEngine``, workers have a ``TemporalWorker``, and the
cluster stores everything. The code of the workflows is generic and runs in workers. Agents run only in two activities,
``run_agent`` and ``run_items``, which share ``flock.steps.executor`` with the embedded engine.

A run is one workflow. Its history is the run's record::

    API process                  cluster (workflow)                   worker (activity)

    submit --- RunOrder -------> flock_run  run:{id}
                                     one step at a time  -RunOrder->  run_agent
                                                                          heartbeats
                                     the next step       <-StepDone-      one step
    wait  <--- close event ----- ends

A run with a session waits for its turn first. The session is a workflow too, which has the order of its runs::

    API process                  cluster (workflow)

    submit --- RunOrder -------> flock_run  run:{id}
      then --- "join" ---------> flock_session  session:{digest}
                                     "begin" ------> flock_run   the first one, with the workflow ids of the last runs
                                     "leave" <------ flock_run   at its end; then the next one begins

A batch is one workflow. It starts a child workflow for each chunk of 20 to 200 items. Up to 20 chunks run at a time::

    API process                  cluster (workflow)                   worker (activity)

    submit_batch
      each chunk - RowsOrder --> flock_batch_rows  rows:{id}:{k}
                                     stores its input, never runs
      all sent --- BatchOrder -> flock_batch  batch:{id}
                                     |  ChunkOrder      ^
                                     |  "set_lanes"     |  Counts
                                     v  "cancel_item"   |
                                 flock_batch_chunk  chunk:{id}:{k}
                                     unless all items run  --------->  find_items
                                                         <-positions-
                                     each free lane    -ItemsOrder->  run_items
                                                                          reads the rows, runs the items
                                                                          heartbeats with ItemsDone
                                     schedules the rest <-ItemsDone-      after 2 s, or 256 KiB of results
    wait_batch < close event --- ends

    delete_batch - DeleteOrder > flock_forget  gone:{id}  --------->  forget_batch

An event that a webhook reports is a child workflow of the run or batch, which outlives it::

    API process                  cluster (workflow)                   API process (activity)

                                 flock_run, flock_batch
                                     |  Webhook
                                     v
                                 flock_webhook  webhook:{id}:{attempt}:{number}
                                     until sent or given up  ------->  send_webhook

The inputs of workflows and activities are called orders. A batch has ``max_workers`` lanes and divides them among its
chunks. Each lane runs one ``ItemsOrder``, whose items run in sequence. Each retry of a run or batch has its own
workflows, whose ids end in the number of the attempt. Its workers read the calls that it keeps from the histories of
the attempts before. Before the history of a batch or chunk gets long, its workflow
continues as new, with its state as the new order.

Where data is stored:

- Rows: in the input of ``flock_batch_rows``.
- Results and errors of items: in the results of ``run_items``, in the chunk's history. For activities that are still
  running: in the last heartbeat. There is no second copy, and ``flock.temporal.records`` reads both.
- Counts: in the memo of the batch for chunks that have ended, and in the memo of each running chunk. ``get_batch`` adds
  them to the counts in heartbeats. This needs no worker.
- The items that each attempt covers: ``Attempt``, in orders and in the memo of the batch.
- Finished calls, answers and messages: in signals to the workflow that has scheduled the step. A batch keeps messages
  to items until it starts their chunk with them.
- What principals have spent, and may spend in a day: in ``flock_account`` workflows (``flock.temporal.accounts``).
- Events for webhooks, and how their tries went: in ``flock_webhook`` workflows (``flock.temporal.reports``).
- Idempotency keys and deleted runs: ``flock_mark`` workflows that never run (``flock.temporal.reservations``).

What happens when:

- An item ends: the worker reports it in its next heartbeat, within 0.1 s. No workflow task is scheduled.
- ``run_items`` returns: the chunk counts the items that have ended, and schedules the rest.
- A chunk ends: the batch starts the next one, or gives the lanes to other chunks ("set_lanes").
- The batch ends: its close event wakes all waiting callers.
- An item is cancelled: the batch signals its chunk, and the chunk cancels the ``run_items`` that has the item. The
  worker reads in the chunk's memo which item it is, and stops only that one.
- A batch is cancelled: the batch cancels its chunks, and these cancel ``run_items``. The memos say that all items stop.
- A worker shuts down: its ``run_items`` return their progress, and the chunks schedule the remaining items.
- A worker dies: after ``heartbeat_timeout_s`` the cluster retries its activities on other workers, with the last
  heartbeats. The next worker signals that it has begun, and what the first one reports afterwards does not count
  (``Fence``). From the second death on, each worker executes what was running in groups, with nothing beside them. What
  was alone in two deaths, and running in ``max_recoveries``, fails (``flock.temporal.suspects``).
"""

from flock.extras import pip_install

try:
    import temporalio  # noqa: F401 - for the error message
except ImportError as exc:
    raise ImportError(f"Runs on a Temporal cluster need temporalio: {pip_install('temporalio')}") from exc

from flock.temporal.engine import TemporalEngine
from flock.temporal.worker import TemporalWorker

__all__ = ["TemporalEngine", "TemporalWorker"]
