// A new batch: rows from a file or pasted, what their columns become, and what is wrong before anything starts.

import {
  Problem,
  button,
  copy,
  count,
  doing,
  fetchTelling,
  fill,
  get,
  go,
  h,
  hasKey,
  idempotencyKey,
  keep,
  newId,
  problem,
  say,
  send,
  session,
  title,
  url,
} from "./app.js";
import { chooser } from "./files.js";
import { form } from "./form.js";
import { check, preview, sniff, without } from "./rows.js";

const KINDS = { csv: "text/csv", ndjson: "application/x-ndjson" };

export async function show(main, { params, signal }) {
  const { agents } = await get("agents", signal);
  if (!agents.length) return fill(main, title("New batch"), h("p", { class: "empty" }, "There are no agents yet."));
  let agent,
    schema,
    rows = null,
    format = null,
    columns = [],
    mapping = {},
    statics = null,
    found = null,
    checking = new AbortController();
  signal.addEventListener("abort", () => checking.abort());

  // Step 1: who works on the rows
  const first = params.get("agent") ?? session.get("batch agent");
  const who = h(
    "select",
    { id: newId() },
    agents.map(({ name }) => h("option", { value: name, selected: name === first }, name)),
  );
  who.addEventListener("change", () => {
    keep("new-batch", { agent: who.value });
    setAgent().catch(failed);
  });
  async function setAgent() {
    const name = who.value;
    session.set("batch agent", name);
    const its = await get(`agents/${encodeURIComponent(name)}`, signal);
    if (who.value !== name) return; // another was chosen meanwhile
    agent = its;
    schema = agent.input_schema;
    const inputs = Object.entries(schema.properties ?? {}).map(
      ([name]) => `${name}${schema.required?.includes(name) ? "" : " (optional)"}`,
    );
    fill(takes, `It takes: ${inputs.join(", ") || "nothing"}.`);
    await setRows();
  }
  const takes = h("p", { class: "quiet" });

  // Step 2: the rows
  const chosen = await chooser(() => setRows().catch(failed));
  signal.throwIfAborted(); // reading what was chosen before cannot be stopped
  let turn = 0;
  async function setRows() {
    const mine = ++turn;
    if (!schema) return; // it comes here again once the agent is there
    rows = chosen.rows();
    if (!rows) {
      checking.abort();
      fill(parts.columns);
      fill(parts.check);
      fill(parts.start);
      return;
    }
    const its = await sniff(rows);
    const first = await preview(rows, its).catch(() => ({ columns: [], rows: [] })); // the check tells why
    if (mine !== turn || signal.aborted) return;
    format = its;
    columns = first.columns;
    const inputs = Object.keys(schema.properties ?? {});
    const before = JSON.parse(session.get(`batch mapping ${agent.name}`) ?? "{}");
    const same = (name) =>
      inputs.find((input) => input.toLowerCase().replace(/[\s_-]/g, "") === name.toLowerCase().replace(/[\s_-]/g, ""));
    mapping = Object.fromEntries(
      columns.map((name) => [
        name,
        inputs.includes(before[name]) || before[name] === ""
          ? before[name]
          : inputs.includes(name)
            ? name
            : (same(name) ?? ""),
      ]),
    );
    drawColumns(first);
    drawStatics();
  }

  // Step 3: what the columns become
  const parts = {
    columns: h("section"),
    statics: h("div"),
    check: h("section", { "aria-label": "Check" }),
    start: h("section"),
  };
  function drawColumns(first) {
    const inputs = Object.keys(schema.properties ?? {});
    const select = (name) =>
      h(
        "select",
        {
          class: "small",
          "aria-label": `Column ${name} becomes`,
          onchange: ({ target }) => {
            mapping[name] = target.value;
            session.set(`batch mapping ${agent.name}`, JSON.stringify(mapping));
            drawStatics();
          },
        },
        h("option", { value: "" }, "(left out)"),
        inputs.map((input) => h("option", { value: input, selected: mapping[name] === input }, input)),
      );
    fill(
      parts.columns,
      h("h2", {}, "Columns"),
      h(
        "p",
        { class: "quiet" },
        format.kind === "csv"
          ? `CSV, cells separated by ${{ ",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars" }[format.delimiter]}. `
          : "NDJSON, an object a line. ",
        "The first rows, and which input each column becomes:",
      ),
      h(
        "div",
        { class: "wide", tabindex: "0", role: "group", "aria-label": "The first rows" },
        h(
          "table",
          {},
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              columns.map((name) => h("th", { scope: "col" }, name || "(no name)", h("br"), select(name))),
            ),
          ),
          h(
            "tbody",
            {},
            first.rows.map((row) =>
              h(
                "tr",
                {},
                columns.map((_, index) => h("td", {}, short(row[index] ?? ""))),
              ),
            ),
          ),
        ),
      ),
      parts.statics,
    );
  }

  function drawStatics() {
    const taken = new Set(Object.values(mapping)),
      required = (schema.required ?? []).filter((name) => !taken.has(name));
    const open = Object.fromEntries(Object.entries(schema.properties ?? {}).filter(([name, its]) => !taken.has(name)));
    let kept = {};
    try {
      kept = JSON.parse(session.get(`statics ${agent.name}`) ?? "{}");
    } catch {
      /* none */
    }
    const bare = Object.fromEntries(
      Object.entries(open).map(([name, its]) => [
        name,
        required.includes(name)
          ? its
          : {
              ...its,
              default: undefined,
              description: [its.description, "default" in its ? `Default: ${JSON.stringify(its.default)}.` : ""]
                .filter(Boolean)
                .join(" "),
            },
      ]),
    );
    statics = form({ ...schema, properties: bare, required }, kept);
    fill(
      parts.statics,
      Object.keys(bare).length > 0 &&
        h(
          "details",
          { open: required.length > 0 },
          h("summary", {}, "The same in every row"),
          h(
            "div",
            {
              oninput: () => {
                try {
                  session.set(`statics ${agent.name}`, JSON.stringify(sameInAll()));
                } catch {
                  /* not yet JSON */
                }
                recheck();
              },
            },
            statics.node,
          ),
        ),
    );
    recheck();
  }

  // Step 4: what is wrong
  function recheck() {
    checking.abort();
    const { signal: its } = (checking = new AbortController());
    found = null;
    const twice = columns.filter(
      (name, index) => mapping[name] && columns.findIndex((other) => mapping[other] === mapping[name]) !== index,
    );
    let given = {};
    try {
      given = sameInAll();
    } catch {
      /* told at the start */
    }
    drawStart();
    if (twice.length)
      return fill(
        parts.check,
        problem({
          title: "Two columns become the same input",
          message: `Change what ${twice.map((name) => `“${name}”`).join(", ")} becomes.`,
        }),
      );
    check(rows, format, {
      schema,
      mapping,
      statics: given,
      signal: its,
      told: (now) => {
        if (its.aborted) return;
        found = now;
        drawCheck();
        drawStart();
      },
    }).catch((error) => {
      if (!its.aborted) failed(error);
    });
  }

  function drawCheck() {
    const { rows: read, wrong, errors, isDone } = found;
    const summary =
      wrong || errors.length
        ? `${count(wrong, "row does", "rows do")} not fit, of ${count(read)}${isDone ? "" : " so far"}.`
        : `${isDone ? "All" : "So far all"} ${count(read, "row fits", "rows fit")}.`;
    fill(
      parts.check,
      h("h2", {}, "Check"),
      h(
        "p",
        { role: "status" },
        h("span", { "aria-hidden": "true" }, wrong || errors.length ? "✕ " : isDone ? "✓ " : "… "),
        summary,
      ),
      errors.length > 0 && lines(errors, wrong),
    );
  }

  // Step 5: start
  const invalid = h(
    "select",
    { id: newId() },
    h("option", { value: "reject" }, "stop the batch before it starts"),
    h("option", { value: "skip" }, "fail, and the others run"),
  );
  invalid.value = session.get("batch invalid") ?? "reject";
  const workers = h("input", {
    id: newId(),
    type: "number",
    min: 1,
    max: 1000,
    value: session.get("batch workers") ?? "5",
  });
  invalid.addEventListener("change", () => {
    session.set("batch invalid", invalid.value);
    drawStart();
  });
  workers.addEventListener("change", () => session.set("batch workers", workers.value));
  const answer = h("div"),
    sent = h("div");
  const startButton = button("Start the batch", () => start({ currentTarget: startButton }), { class: "primary" });
  function drawStart() {
    const isWrong = found && (found.wrong > 0 || found.errors.length > 0),
      isStopped = isWrong && (invalid.value === "reject" || found.isUnreadable);
    startButton.disabled = !found || isStopped || (found.isDone && found.rows === 0);
    fill(
      why,
      isStopped
        ? "Mend the rows or the columns first, or let the rows that do not fit fail."
        : found && !found.isDone
          ? "You may start before all rows are checked: the server checks them, too."
          : "",
    );
    if (!parts.start.contains(startButton))
      fill(
        parts.start,
        h("h2", {}, "Start"),
        h(
          "div",
          { class: "filters" },
          h("label", { for: invalid.id }, "Rows that do not fit", invalid),
          h("label", { for: workers.id }, "Rows at the same time", workers),
        ),
        answer,
        sent,
        h("p", { class: "actions" }, startButton, button("Copy as curl", copyCurl)),
        why,
      );
  }
  const why = h("p", { class: "quiet" });

  const sameInAll = () => Object.fromEntries(Object.entries(statics.read()).filter(([, value]) => value !== ""));

  const leftOutNow = () => columns.filter((name) => mapping[name] === "");

  function query() {
    const names = Object.fromEntries(Object.entries(mapping).filter(([name, input]) => input && input !== name));
    const given = sameInAll();
    return new URLSearchParams({
      agent_name: agent.name,
      on_invalid: invalid.value,
      max_workers: workers.value || "5",
      ...(Object.keys(names).length ? { input_mapping: JSON.stringify(names) } : {}),
      ...(Object.keys(given).length ? { static_inputs: JSON.stringify(given) } : {}),
      ...(format.kind === "csv" && format.delimiter !== "," ? { delimiter: format.delimiter } : {}),
    });
  }

  const start = doing(async () => {
    fill(answer);
    statics.clear();
    let options;
    try {
      options = query();
    } catch (error) {
      return void (error.pointer && statics.error(error.pointer, error.message)?.focus());
    }
    const leftOut = new Set(leftOutNow());
    const body = leftOut.size ? await without(rows, format, leftOut, signal) : rows;
    const bar = h("progress", { max: body.size, value: 0 }),
      words = h("span", { role: "status" }, "Sending the rows …");
    fill(sent, h("label", {}, words, bar));
    const tell = (bytes) => {
      bar.value = bytes;
      if (bytes >= body.size) fill(words, "The rows are sent. The server looks at each, and keeps it …");
    };
    try {
      const text = await send(`run/batch?${options}`, {
        method: "POST",
        body,
        signal,
        by: fetchTelling(tell),
        headers: { "Content-Type": KINDS[format.kind], ...idempotencyKey() },
      });
      const batch = JSON.parse(text);
      session.set(`batch mapping ${agent.name}`, null);
      await chosen.forget();
      go(`batch/${batch.batch_id}`);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      const errors = error.errors.filter((each) => each.line);
      fill(
        answer,
        problem({
          title: error.title,
          message: errors.length ? "Nothing has started. What the server found:" : error.message,
          errors: error.errors.filter((each) => !each.line),
          requestId: error.requestId,
        }),
        errors.length > 0 &&
          lines(
            errors.map((each) => ({ ...each, column: each.pointer.slice(1) })),
            errors.length,
          ),
      );
    } finally {
      fill(sent);
    }
  });

  async function copyCurl() {
    await copy(curl(), "Command");
    const leftOut = leftOutNow();
    if (leftOut.length)
      say(`Command copied. It does not leave out columns: take ${leftOut.join(", ")} out of the file.`);
  }

  function curl() {
    const name = rows.name ?? `rows.${format.kind}`;
    const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
    return `curl -X POST ${quoted(`${url("run/batch")}?${query()}`)} -H 'Content-Type: ${KINDS[format.kind]}'${hasKey() ? ' -H "Authorization: Bearer $FLOCK_API_KEY"' : ""} --data-binary ${quoted(`@${name}`)}`;
  }

  const failed = (error) => {
    if (!signal.aborted) fill(parts.check, problem(error));
  };
  main.append(
    title("New batch"),
    h("section", {}, h("div", { class: "field" }, h("label", { for: who.id }, "Agent"), who, takes)),
    h("section", {}, h("h2", {}, "Rows"), chosen.node),
    parts.columns,
    parts.check,
    parts.start,
  );
  await setAgent();
}

/** What is wrong, by line. */
function lines(errors, wrong) {
  return [
    h(
      "div",
      { class: "wide", tabindex: "0", role: "group", "aria-label": "What is wrong" },
      h(
        "table",
        {},
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            ["Line", "Column", "What is wrong"].map((text) => h("th", { scope: "col" }, text)),
          ),
        ),
        h(
          "tbody",
          {},
          errors
            .slice(0, 100)
            .map((each) =>
              h(
                "tr",
                {},
                h("td", { class: "number" }, each.line),
                h("td", {}, each.column ?? ""),
                h("td", {}, each.detail),
              ),
            ),
        ),
      ),
    ),
    wrong > 100 && h("p", { class: "quiet" }, "The first 100 are shown."),
  ];
}

const short = (text) => (text.length > 120 ? `${text.slice(0, 120)} …` : text);
