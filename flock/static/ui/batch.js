// The view of a batch: progress, results, and durations of its rows.

import { link, updateAddress, url } from "./address.js";
import { Problem, get, post, send } from "./api.js";
import { lastAgents, outputsOf } from "./chain.js";
import { chart, drawOutcomes, outcomeBar, outcomeWords } from "./chart.js";
import { button, fact, fill, h, quiet, select, submitting } from "./dom.js";
import { events } from "./events.js";
import { form, sending } from "./form.js";
import { isFile, textOf } from "./json.js";
import { hasKey } from "./key.js";
import { busyWhile, notify } from "./notices.js";
import { announcer, ended, failing, failure, heading, spent } from "./record.js";
import { fileOf } from "./reference.js";
import { saveAs, saveBlob } from "./save.js";
import { PAGE_ROWS, bigTable } from "./table.js";
import { everySecond } from "./wait.js";
import { badge, between, count, duration, isFinal, when } from "./words.js";

const RATE_OVER_MS = 10_000;
/** CSV as spreadsheets read it where 0,5 is a number. */
const COMMAS = ["csv&delimiter=;&decimal=,&encoding=utf-8-sig", "csv with 0,5"];
const REFRESH_MS = 1000;
const ANNOUNCE_EVERY_MS = 5000;
const FEW_ROWS = 10;

export async function show(main, { id, params, signal }) {
  const path = `batch/${encodeURIComponent(id)}`;
  let batch = await get(`${path}?results=false`, signal),
    table = null,
    samples = [],
    refreshedAt = 0;
  const agent = await get(`agents/${encodeURIComponent(batch.agent_name)}`, signal).catch((error) => {
    if (error instanceof Problem) return null;
    throw error;
  });
  const last = agent ? await lastAgents(agent, signal) : [];
  const parts = {
    retry: h("div"),
    progress: h("section", { "aria-label": "Progress" }),
    facts: h("dl.facts"),
    error: h("div"),
    failure: h("div"),
    chart: h("section", { "aria-label": "Durations" }),
    results: h("section", { "aria-label": "Results" }),
  };
  const head = heading(),
    live = announcer(ANNOUNCE_EVERY_MS);
  const bar = outcomeBar(),
    words = h("p.outcomes");
  main.append(
    head.node,
    parts.retry,
    parts.progress,
    live.node,
    parts.facts,
    parts.error,
    parts.failure,
    parts.chart,
    parts.results,
  );
  fill(parts.progress, bar, words);

  // --- Progress ---

  async function follow() {
    samples = [];
    for (;;) {
      batch = await get(`${path}?results=false`, signal);
      draw();
      if (isFinal(batch.status)) break;
      for await (const { data } of events(`${path}/events`, signal)) {
        batch = { ...batch, ...data };
        samples.push([performance.now(), batch.completed_items]);
        isStale = true;
        draw();
        refreshSoon();
      }
    }
    live.say(`The batch ${ended[batch.status]}. ${bar.ariaValueText}.`);
    await refresh();
  }

  function draw() {
    const kind = isFinal(batch.status) ? `${batch.status} ${batch.failed_items} ${batch.cancelled_items}` : "open";
    head.draw(batch, kind, buttons);
    const rate = currentRate();
    drawOutcomes(bar, batch);
    fill(
      words,
      h(
        "span",
        isFinal(batch.status)
          ? count(batch.total_items, "row")
          : `${count(batch.completed_items)} of ${count(batch.total_items, "row")} (${batch.progress_percentage} %)`,
      ),
      outcomeWords(batch),
    );
    fill(
      parts.facts,
      fact("Rate", rate === null ? "–" : `${rate < 10 ? rate.toFixed(1) : count(Math.round(rate))} rows per second`),
      isFinal(batch.status)
        ? fact("Duration", duration(between(batch.started_at, batch.completed_at)))
        : fact("Time left", batch.eta_s === null ? "unknown" : `about ${duration(batch.eta_s)}`),
      fact("Submitted", when(batch.created_at)),
      batch.attempt > 1 && fact("Attempt", batch.attempt),
      spent(batch),
      fact("Batch", h("code", batch.batch_id)),
    );
    fill(
      parts.error,
      batch.status === "failed" && failure(batch, "The batch failed"),
      batch.status === "completed" && batch.error && quiet(batch.error),
    );
    if (!isFinal(batch.status))
      live.sayRarely(`${batch.progress_percentage} % done, ${count(batch.failed_items)} failed.`);
  }

  /** Rows per second: recently while the batch is running, otherwise over its whole duration. */
  function currentRate() {
    const now = performance.now();
    while (samples.length > 1 && samples[0][0] < now - RATE_OVER_MS) samples.shift();
    if (!isFinal(batch.status) && samples.length && now - samples[0][0] > 500)
      return ((batch.completed_items - samples[0][1]) / (now - samples[0][0])) * 1000;
    return batch.started_at && batch.attempt === 1
      ? (batch.completed_items - batch.cancelled_items) / Math.max(0.001, between(batch.started_at, batch.completed_at))
      : null;
  }

  const format = select(["csv", COMMAS, "tsv", "xlsx", "parquet", "json", "ndjson"], "csv", { "aria-label": "Format" });
  function buttons() {
    const cancel = busyWhile(async () => {
      notify("Cancelling …");
      await post(`${path}/cancel`, undefined, { signal });
    });
    const { failed_items, cancelled_items, max_cost } = batch;
    const isLimited = max_cost && isFinal(batch.status) && failed_items + cancelled_items > 0;
    const limit = { label: "Max cost in US dollars", type: "number", exclusiveMinimum: 0 };
    const fields = form({ properties: { max_cost: { ...limit, description: "For all attempts together." } } }, batch);
    const sent = sending(fields, "");
    fill(parts.retry, isLimited && fields.node, sent.wrong);
    const retry = (text, only) => {
      const start = sent.send(async (chosen) => {
        await post(`${path}/retry`, { only, ...chosen }, { signal });
        run();
      });
      return button(text, start, { class: "primary" });
    };
    const start = busyWhile(() =>
      download(`${path}/results?format=${format.value}`, `${batch.batch_id}.${format.value.split("&")[0]}`),
    );
    return [
      isFinal(batch.status)
        ? [
            failed_items > 0 && retry("Retry failed rows", "failed"),
            failed_items > 0 && cancelled_items > 0 && retry("Resume cancelled rows", "cancelled"),
            cancelled_items > 0 && retry(failed_items ? "Resume all" : "Resume"),
          ]
        : button("Cancel", cancel),
      format,
      button("Download", start),
    ];
  }

  // --- Results ---

  let status = params.get("status") ?? "",
    cursors = [-1],
    hasResults = false;
  let first = Math.max(0, Number(params.get("row") || 1) - 1);
  const counts = () => ({
    "": batch.total_items,
    completed: batch.completed_items - batch.failed_items - batch.cancelled_items,
    failed: batch.failed_items,
    cancelled: batch.cancelled_items,
  });

  const items = (after, limit, signal) =>
    get(`${path}/results?format=json&after=${after}&limit=${limit}${status && "&status="}${status}`, signal);

  async function load(page, signal) {
    if (!status) {
      // place each item at its position, since the response omits items that have not ended
      const rows = [];
      for (const item of await items(page * PAGE_ROWS - 1, PAGE_ROWS, signal))
        if (item.position < (page + 1) * PAGE_ROWS) rows[item.position - page * PAGE_ROWS] = item;
      return rows;
    }
    for (let current = Math.min(page, cursors.length - 1); ; current++) {
      // each page starts after the last item of the previous page
      const rows = await items(cursors[current], PAGE_ROWS, signal);
      if (rows.length) cursors[current + 1] = rows.at(-1).position;
      if (current === page || !rows.length) return rows;
    }
  }

  async function drawTable() {
    const sample = await get(`${path}/results?format=json&limit=20`, signal);
    const names = (member, known = []) =>
      [...new Set([...known, ...sample.flatMap((item) => Object.keys(item[member] ?? {}))])].slice(0, 12);
    const extras = names("extra"),
      inputs = names("inputs", Object.keys(agent?.input_schema.properties ?? {}));
    hasResults = sample.some((item) => item.result);
    const outputs = names("result", hasResults ? [] : outputsOf(last));
    const columns = [
      { name: "Row", min: 6.5, max: "6.5rem" },
      { name: "Status", min: 8.5, max: "8.5rem" },
      ...[
        ...extras,
        ...inputs,
        ...outputs.map((name) => (inputs.includes(name) ? `result.${name}` : name)),
        "Error",
      ].map((name) => ({ name, min: name === "Error" ? 14 : 10, max: name === "Error" ? "2fr" : "1fr" })),
    ];
    const cell = (value) => (isFile(value) ? fileOf(value, true) : textOf(value ?? "").slice(0, 200));
    table = bigTable({
      label: "Results",
      columns,
      total: counts()[status],
      start: first,
      load,
      signal,
      cells: (item, index) =>
        item
          ? [
              h("a", { href: link(`run/${item.run_id}`) }, count(item.position + 1)),
              badge(item.status),
              ...extras.map((name) => cell(item.extra?.[name])),
              ...inputs.map((name) => cell(item.inputs[name])),
              ...outputs.map((name) => cell(item.result?.[name])),
              cell(item.error),
            ]
          : [
              count(index + 1),
              h("span.quiet", "…"),
              ...columns.slice(2).map(() => ""),
            ],
      onError: showError,
      onScroll: (row) => {
        first = row;
        clearTimeout(scrolling);
        scrolling = setTimeout(() => {
          if (!signal.aborted) updateAddress(`batch/${id}`, { row: row ? row + 1 : "", status });
        }, 400);
      },
    });
    const options = [["", "All rows"], "completed", "failed", "cancelled"];
    const onchange = ({ target }) => {
      status = target.value;
      cursors = [-1];
      first = 0;
      updateAddress(`batch/${id}`, { status });
      drawTable().then(() => parts.results.querySelector("select").focus(), showError);
    };
    const number = h("input", { inputmode: "numeric", pattern: "\\d+", title: "Row number", placeholder: "1" });
    const goTo = h(
      "form.filters",
      { onsubmit: submitting(() => number.value && table.goTo(Number(number.value) - 1)) },
      h("label", "Show", select(options, status, { onchange })),
      batch.total_items > FEW_ROWS && [h("label", "Go to row", number), h("button", "Go")],
    );
    fill(parts.results, h("h2", "Results"), goTo, table.node);
    requestAnimationFrame(() => table.goTo(first, false));
  }
  let scrolling,
    isRefreshing = false,
    isStale = false;

  function refreshSoon() {
    if (isStale && performance.now() - refreshedAt > REFRESH_MS && !isRefreshing)
      refresh().catch((error) => {
        if (!signal.aborted) notify(error.message);
      });
  }

  async function refresh() {
    isRefreshing = true;
    isStale = false; // later events belong to the next refresh
    try {
      if (status) table?.resize(counts()[status]);
      cursors = [-1];
      if (!hasResults && counts().completed) await drawTable();
      else
        await table?.refresh(
          (page) => Object.keys(page).length < PAGE_ROWS || page.some((item) => item.status !== "completed"),
        );
      await drawChart();
    } finally {
      refreshedAt = performance.now();
      isRefreshing = false;
    }
  }

  // --- Durations ---

  /** Draw the chart from a sample spread over the batch. */
  async function drawChart() {
    const starts =
      batch.total_items <= 200
        ? [-1]
        : [0, 1, 2, 3].map((quarter) => Math.floor((batch.total_items * quarter) / 4) - 1);
    const found = await Promise.all(
      starts.map((after) =>
        get(`${path}/results?format=json&after=${after}&limit=${starts.length > 1 ? 50 : 200}`, signal),
      ),
    );
    signal.throwIfAborted(); // a view that was closed has no width
    const sample = new Map(found.flat().map((item) => [item.position, item]));
    fill(parts.chart, chart([...sample.values()], main.clientWidth));
  }

  const showError = failing(main, parts.failure, run, signal);
  function run() {
    fill(parts.failure);
    table?.refresh(() => true).catch(() => {});
    follow().catch(showError);
  }
  everySecond(() => {
    if (isFinal(batch.status)) return;
    draw(); // the rate drops even if no row ends
    refreshSoon();
  }, signal);
  draw();
  await drawTable();
  run();
}

/** Download a file from the server. A plain link cannot send a key. */
async function download(path, name) {
  if (!hasKey()) return saveAs(url(path), name);
  saveBlob(await (await send(path, { isStream: true })).blob(), name);
}
