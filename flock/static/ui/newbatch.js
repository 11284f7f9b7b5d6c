// A new batch: rows from a file or pasted, the input that each column becomes, and what is wrong before it starts.

import { go, keep, url } from "./address.js";
import { Problem, get, idempotencyKey, send } from "./api.js";
import { lastAgent } from "./chain.js";
import { button, fill, h, newId, title } from "./dom.js";
import { chooser } from "./files.js";
import { form } from "./form.js";
import { parse } from "./json.js";
import { hasKey } from "./key.js";
import { copy, doing, problem, say } from "./notices.js";
import { check, preview, sniff, without } from "./rows.js";
import { session } from "./storage.js";
import { aboutBatches, count } from "./words.js";

/** What a column may become beside an input: left out of what is sent, or kept with the results. */
const [LEFT_OUT, KEPT] = ["", "*"];
const KINDS = { csv: "text/csv", ndjson: "application/x-ndjson" };

export async function show(main, { params, signal }) {
  const { agents } = await get("agents", signal);
  if (!agents.length) return fill(main, title("New batch"), h("p", { class: "empty" }, "There are no agents yet."));
  let agent,
    schema,
    outputs,
    rows = null,
    format = null,
    sample = [],
    columns = [],
    mapping = {},
    needed = null,
    others = null,
    found = null,
    checking = new AbortController();
  signal.addEventListener("abort", () => checking.abort());

  // Step 1: the agent
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
    const its = await get(`agents/${encodeURIComponent(name)}`, signal),
      last = await lastAgent(its, signal);
    if (who.value !== name) return; // another was chosen meanwhile
    agent = its;
    outputs = Object.keys(last.output_schema.properties ?? {});
    schema = agent.input_schema;
    const inputs = Object.entries(schema.properties ?? {}).map(
      ([name]) => `${name}${schema.required?.includes(name) ? "" : " (optional)"}`,
    );
    fill(takes, `Inputs: ${inputs.join(", ") || "none"}.`);
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
      for (const part of Object.values(parts)) fill(part);
      parts.needed.classList.remove("problem");
      return;
    }
    const its = await sniff(rows);
    const first = await preview(rows, its).catch(() => ({ columns: [], rows: [] })); // the check tells why
    if (mine !== turn || signal.aborted) return;
    format = its;
    sample = first.rows;
    columns = first.columns;
    const before = JSON.parse(session.get(`batch mapping ${agent.name}`) ?? "{}");
    mapping = Object.fromEntries(
      columns.map((name) => [
        name,
        choicesFor(name).includes(before[name])
          ? before[name]
          : isInput(name)
            ? name
            : (inputLike(name) ?? (mayBeKept(name) ? KEPT : LEFT_OUT)),
      ]),
    );
    drawColumns();
    drawStatics();
  }

  const inputs = () => Object.keys(schema.properties ?? {});
  const isInput = (name) => Object.hasOwn(schema.properties ?? {}, name);
  const bare = (name) => name.toLowerCase().replace(/[\s_-]/g, "");
  const inputLike = (name) => inputs().find((input) => bare(input) === bare(name));
  /** The server takes a column that is called as an input for that input, and refuses names that a result has. */
  const mayBeKept = (name) =>
    name !== "" &&
    !inputs().some((input) => input.toLowerCase() === name.toLowerCase()) &&
    ![...outputs, "error", "error_type"].includes(name) &&
    columns.indexOf(name) === columns.lastIndexOf(name);
  const choicesFor = (name) => [...(mayBeKept(name) ? [KEPT] : []), LEFT_OUT, ...inputs()];

  function map(name, input) {
    mapping[name] = input;
    session.set(`batch mapping ${agent.name}`, JSON.stringify(mapping));
    drawStatics();
  }

  // Step 3: what the columns become
  const parts = {
    columns: h("section"),
    needed: h("section", { "aria-label": "Inputs without a column" }),
    others: h("section"),
    check: h("section", { "aria-label": "Check" }),
    start: h("section"),
  };
  function drawColumns() {
    if (!columns.length) return fill(parts.columns); // the check says why
    const words = { [KEPT]: "(kept with the results)", [LEFT_OUT]: "(left out)" };
    const select = (name) =>
      h(
        "select",
        {
          class: "small",
          "aria-label": `Column ${name} becomes`,
          "data-column": name,
          onchange: ({ target }) => map(name, target.value),
        },
        choicesFor(name).map((choice) =>
          h("option", { value: choice, selected: mapping[name] === choice }, words[choice] ?? choice),
        ),
      );
    return fill(
      parts.columns,
      h("h2", {}, "Columns"),
      h(
        "p",
        { class: "quiet" },
        format.kind === "csv"
          ? `CSV, cells separated by ${{ ",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars" }[format.delimiter]}. `
          : "NDJSON, an object a line. ",
        "The first rows, and what each column becomes:",
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
            sample.map((row) =>
              h(
                "tr",
                {},
                columns.map((_, index) => h("td", {}, short(row[index] ?? ""))),
              ),
            ),
          ),
        ),
      ),
    );
  }

  /** What no column holds: a place to choose one, or to give one value for every row. */
  function drawStatics() {
    const taken = new Set(Object.values(mapping)),
      required = columns.length ? (schema.required ?? []).filter((name) => !taken.has(name)) : [];
    let kept = {};
    try {
      kept = parse(session.get(`statics ${agent.name}`) ?? "{}");
    } catch {
      /* none */
    }
    const open = Object.entries(schema.properties ?? {}).filter(([name]) => !taken.has(name));
    const formOf = (properties, required) =>
      form({ ...schema, properties: Object.fromEntries(properties), required }, kept);
    needed = formOf(
      open.filter(([name]) => required.includes(name)),
      required,
    );
    others = formOf(
      open
        .filter(([name]) => !required.includes(name))
        .map(([name, its]) => {
          const shown = "default" in its ? `Default: ${JSON.stringify(its.default)}.` : "";
          return [name, { ...its, default: undefined, description: [its.description, shown].filter(Boolean).join(" ") }];
        }),
      [],
    );
    fill(
      parts.needed,
      required.length > 0 && [
        h("h2", {}, `There is no column for ${listed(required)}`),
        h("p", {}, "Choose a column, or give one value for every row."),
        h("div", { class: "columns" }, required.map(columnChoice), h("div", { oninput: changed }, needed.node)),
      ],
    );
    fill(
      parts.others,
      columns.length > 0 &&
        open.length > required.length &&
        h(
          "details",
          {},
          h("summary", {}, "The same in every row"),
          h("div", { oninput: changed }, others.node),
        ),
    );
    recheck();
  }

  /** A select of the columns that are not an input yet. */
  function columnChoice(input) {
    const free = columns.filter((name) => name && !isInput(mapping[name])),
      id = newId();
    const select = h(
      "select",
      {
        id,
        disabled: !free.length,
        onchange: () => {
          map(select.value, input);
          drawColumns();
          parts.columns.querySelector(`[data-column="${CSS.escape(select.value)}"]`).focus();
        },
      },
      h("option", { value: "" }, free.length ? "Choose …" : "No column is left"),
      free.map((name) => h("option", { value: name }, name)),
    );
    return h("div", { class: "field" }, h("label", { for: id }, `Column for ${input}`), select);
  }

  function changed() {
    try {
      session.set(`statics ${agent.name}`, JSON.stringify(sameInAll()));
      needed.clear();
      others.clear();
    } catch {
      /* its field says so */
    }
    recheck();
  }

  // Step 4: what is wrong
  function recheck() {
    checking.abort();
    const { signal: its } = (checking = new AbortController());
    found = null;
    let given = null;
    try {
      given = sameInAll();
    } catch {
      /* its field says so */
    }
    const taken = new Set(Object.values(mapping));
    const missing = columns.length ? (schema.required ?? []).filter((name) => !taken.has(name) && !(name in (given ?? {}))) : [];
    parts.needed.classList.toggle("problem", missing.length > 0);
    if (missing.length) {
      fill(parts.check);
      return fill(parts.start);
    }
    drawStart();
    const twice = columns.filter(
      (name, index) => isInput(mapping[name]) && columns.findIndex((other) => mapping[other] === mapping[name]) !== index,
    );
    if (twice.length)
      return fill(
        parts.check,
        problem({
          title: "Two columns become the same input",
          message: `Change what ${listed(twice)} becomes.`,
        }),
      );
    if (!given) return fill(parts.check);
    return check(rows, format, {
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
    const isEmpty = isDone && read === 0 && !errors.length;
    const summary = isEmpty
      ? `There are no rows${format.kind === "csv" ? " below the header" : ""}.`
      : wrong || errors.length
        ? `${count(wrong, "row does", "rows do")} not fit, of ${count(read)}${isDone ? "" : " so far"}.`
        : `${isDone ? "All" : "So far all"} ${count(read, "row fits", "rows fit")}.`;
    fill(
      parts.check,
      h("h2", {}, "Check"),
      h(
        "p",
        { role: "status" },
        h("span", { "aria-hidden": "true" }, isEmpty || wrong || errors.length ? "✕ " : isDone ? "✓ " : "… "),
        summary,
      ),
      errors.length > 0 && lines(errors, wrong),
    );
  }

  // Step 5: start
  const invalid = h(
    "select",
    { id: newId() },
    h("option", { value: "reject" }, "keep the batch from starting"),
    h("option", { value: "skip" }, "fail, and the other rows run"),
  );
  invalid.value = session.get("batch invalid") ?? "reject";
  invalid.addEventListener("change", () => {
    session.set("batch invalid", invalid.value);
    drawStart();
  });
  const WORKERS = "Rows at the same time";
  const pace = form(
    { properties: { [WORKERS]: { type: "integer", minimum: 1, maximum: 1000 } } },
    { [WORKERS]: Number(session.get("batch workers")) || 5 },
  );
  pace.node.addEventListener("change", () => {
    try {
      session.set("batch workers", pace.read()[WORKERS]);
    } catch {
      /* its field says so */
    }
  });
  const answer = h("div"),
    sent = h("div"),
    why = h("p", { class: "quiet" });
  const startButton = button("Start the batch", () => start({ currentTarget: startButton }), { class: "primary" });
  function drawStart() {
    const isWrong = found && (found.wrong > 0 || found.errors.length > 0),
      isStopped = isWrong && (invalid.value === "reject" || found.isUnreadable);
    startButton.disabled = !found?.rows || isStopped;
    fill(
      why,
      isStopped
        ? "Fix the rows or the columns first, or let the other rows run."
        : found?.rows && !found.isDone
          ? "You can start before all rows are checked: the server checks them too."
          : "",
    );
    if (!parts.start.contains(startButton))
      fill(
        parts.start,
        h("h2", {}, "Start"),
        h(
          "div",
          { class: "columns" },
          h("div", { class: "field" }, h("label", { for: invalid.id }, "Rows that do not fit"), invalid),
          pace.node,
        ),
        answer,
        sent,
        h("p", { class: "actions" }, startButton, button("Copy as curl", copyCurl)),
        why,
      );
  }

  const sameInAll = () =>
    Object.fromEntries(Object.entries({ ...needed.read(), ...others.read() }).filter(([, value]) => value !== ""));

  const leftOutNow = () => columns.filter((name) => mapping[name] === LEFT_OUT);

  /** The options of the request, or null after the field that is wrong has said so. */
  function query() {
    try {
      return options();
    } catch (error) {
      [needed, others, pace].map((fields) => fields.error(error.pointer, error.message)).find(Boolean)?.focus();
      return null;
    }
  }

  function options() {
    const names = Object.fromEntries(Object.entries(mapping).filter(([name, input]) => isInput(input) && input !== name));
    const given = sameInAll();
    return new URLSearchParams({
      agent_name: agent.name,
      on_invalid: invalid.value,
      on_extra: "keep",
      max_workers: pace.read()[WORKERS] ?? 5,
      ...(Object.keys(names).length ? { input_mapping: JSON.stringify(names) } : {}),
      ...(Object.keys(given).length ? { static_inputs: JSON.stringify(given) } : {}),
      ...(format.kind === "csv" && format.delimiter !== "," ? { delimiter: format.delimiter } : {}),
    });
  }

  const start = doing(async () => {
    fill(answer);
    const options = query();
    if (!options) return;
    const leftOut = new Set(leftOutNow());
    const body = leftOut.size ? await without(rows, format, leftOut, signal) : rows;
    const bar = h("progress", { max: body.size, value: 0 }),
      words = h("span", { role: "status" }, "Sending the rows …");
    fill(sent, h("label", {}, words, bar));
    const tell = (bytes) => {
      bar.value = bytes;
      if (bytes >= body.size) fill(words, "The rows are sent. The server is checking and storing them …");
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
          message: errors.length ? "The batch has not started. The server found:" : error.message,
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
    const options = query();
    if (!options) return;
    await copy(curl(options), "Command");
    const leftOut = leftOutNow();
    if (leftOut.length)
      say(`Command copied. It sends all columns: remove ${leftOut.join(", ")} from the file first.`);
  }

  function curl(options) {
    const name = rows.name ?? `rows.${format.kind}`;
    const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
    return `curl -X POST ${quoted(`${url("run/batch")}?${options}`)} -H 'Content-Type: ${KINDS[format.kind]}'${hasKey() ? ' -H "Authorization: Bearer $FLOCK_API_KEY"' : ""} --data-binary ${quoted(`@${name}`)}`;
  }

  const failed = (error) => {
    if (!signal.aborted) fill(parts.check, problem(error));
  };
  main.append(
    title("New batch"),
    aboutBatches(),
    h("section", {}, h("div", { class: "field" }, h("label", { for: who.id }, "Agent"), who, takes)),
    h("section", {}, h("h2", {}, "Rows"), chosen.node),
    parts.columns,
    parts.needed,
    parts.others,
    parts.check,
    parts.start,
  );
  await setAgent();
}

/** As `fetch`, which cannot report how much of a body has been sent. */
const fetchTelling =
  (told) =>
  (address, { method, headers, body, signal }) =>
    new Promise((done, fail) => {
      const request = new XMLHttpRequest(),
        stop = () => request.abort();
      request.open(method, address);
      for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
      request.upload.onprogress = ({ loaded }) => told(loaded);
      request.onload = () =>
        done(
          new Response(request.responseText, {
            status: request.status,
            headers: { "Retry-After": request.getResponseHeader("Retry-After") ?? "" },
          }),
        );
      request.onerror = () => fail(new TypeError("The connection broke."));
      request.onabort = () => fail(new DOMException("It was stopped.", "AbortError"));
      signal?.addEventListener("abort", stop, { once: true });
      request.send(body);
    });

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

const listed = (names) => names.map((name) => `“${name}”`).join(", ");
const short = (text) => (text.length > 120 ? `${text.slice(0, 120)} …` : text);
