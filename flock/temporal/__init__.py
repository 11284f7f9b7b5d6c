"""The same API on more than one machine: runs are workflows on a Temporal cluster, and workers carry them out.

There are three kinds of processes. API processes have a ``TemporalEngine``, workers have a ``TemporalWorker``, and the
cluster keeps everything. Workflows are our own generic code, which runs in workers. Agents run only in two activities,
``run_agent`` and ``run_items``, which take turns as the embedded engine does (``flock.engine.turns``).

A run is one workflow. Its history is the run's record::

    API process                  cluster (workflow)                   worker (activity)

    submit --- RunOrder -------> flock_run  run:{id}
                                     one turn at a time  -RunOrder->  run_agent
                                                                          heartbeats: Heartbeat
                                     the next turn       <-StepDone-      one step
    wait  <--- close event ----- ends

A batch is one workflow. It starts a child for each chunk of 20 to 200 items, and has 20 of them at work at a time::

    API process                  cluster (workflow)                   worker (activity)

    submit_batch
      each chunk - RowsOrder --> flock_batch_rows  rows:{id}:{k}
                                     keeps its input, never runs
      all sent --- BatchOrder -> flock_batch  batch:{id}
                                     |  ChunkOrder      ^
                                     |  "set_lanes"     |  Counts
                                     v  "cancel_item"   |
                                 flock_batch_chunk  chunk:{id}:{k}
                                     if not all is new   ---------->  find_items
                                                         <-positions-
                                     each free lane    -ItemsOrder->  run_items
                                                                          reads the rows, takes turns
                                                                          heartbeats: ItemsDone
                                     orders the rest   <-ItemsDone--      after 2 s, or 256 KiB of results
    wait_batch < close event --- ends

    delete_batch - DeleteOrder > flock_forget  gone:{id}  --------->  forget_batch

A batch has ``max_workers`` lanes and shares them out to its chunks. In each lane one ``ItemsOrder`` is at work, and its
items are taken one after the other. Each retry of a run or batch has workflows of its own, with the number of the
attempt at the end of their ids. Before the history of a batch or chunk is long, it continues in a new one
(continue-as-new), with all that it knows in a new order.

Where things are:

- Rows: in the input of ``flock_batch_rows``.
- Results and errors of items: in what ``run_items`` returned, in the chunk's history, and for items at work in its last
  heartbeat. They are kept once, and ``flock.temporal.chunks`` reads both.
- Counts: in the memo of the batch for chunks that have ended, and in the memo of each chunk at work. ``get_batch`` adds
  them up with the heartbeats. No worker is needed for that.
- What each attempt was about: ``Attempt``, in orders and in the memo of the batch.
- Idempotency keys and deleted runs: ``flock_mark`` workflows that never run (``flock.temporal.reservations``).

Who wakes whom:

- An item ends: nobody is woken. The worker reports it with its next heartbeat, within 0.1 s.
- ``run_items`` returns: the chunk counts what has ended, and orders the rest.
- A chunk ends: the batch starts the next one, or gives the lanes to other chunks ("set_lanes").
- The batch ends: all that wait for its close event.
- An item is cancelled: the batch signals its chunk, and the chunk cancels the ``run_items`` that has the item. The
  worker reads in the chunk's memo which item is meant, and stops only that one.
- A batch is cancelled: the batch cancels its chunks, these cancel ``run_items``, and the memos say that all is meant.
- A worker stops: its ``run_items`` return what they have, and the chunks order the rest.
- A worker dies: after ``heartbeat_timeout_s`` the cluster gives its orders to other workers, with the last heartbeats.
  After 20 tries the item that was at work fails.
"""

from flock.extras import pip_install

try:
    import temporalio  # noqa: F401 - to say what is missing
except ImportError as exc:
    raise ImportError(f"Runs on a Temporal cluster need temporalio: {pip_install('temporalio')}") from exc

from flock.temporal.engine import TemporalEngine
from flock.temporal.worker import TemporalWorker

__all__ = ["TemporalEngine", "TemporalWorker"]
