// The view to start a batch: choose rows, map columns to inputs, check the rows, and start.

import { go, updateAddress } from "./address.js";
import { Problem, get, idempotencyKey } from "./api.js";
import { lastAgents, outputsOf } from "./chain.js";
import { errorTable, summary } from "./check.js";
import { copyCurl, quoted } from "./curl.js";
import { actions, button, fill, h, quiet, select, table, title, wide, withLabel } from "./dom.js";
import { chooser } from "./files.js";
import { form, keep } from "./form.js";
import { textOf } from "./json.js";
import { DROPPED, KEPT, Mapping } from "./mapping.js";
import { busyWhile, problem } from "./notices.js";
import { session, stored } from "./storage.js";
import { TableFiles } from "./tablefiles.js";
import { MEDIA_TYPES, checkRows, formatOf, headOf, sendRows } from "./upload.js";
import { pause } from "./wait.js";
import { aboutBatches } from "./words.js";

const CHECK_DELAY_MS = 200;
const SHOWN_ROWS = 5;
const DELIMITERS = { ",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars" };
const ENCODINGS = [
  ...["utf-8", "utf-16", "windows-1252", "windows-1250", "windows-1251", "iso-8859-15"],
  ...["shift_jis", "euc-jp", "gb18030", "big5", "euc-kr"],
];
const CSV_DEFAULTS = { delimiter: ",", decimal: ".", encoding: "utf-8" };
const TRIED_ROWS = 20;
const rows = { type: "integer", minimum: 1, description: "The others run if you resume." };
/** More options of a batch, by their names in the API. */
const MORE = {
  max_workers: { label: "Rows in parallel", type: "integer", minimum: 1, maximum: 1000, default: 5 },
  limit: { label: "First rows", ...rows },
  sample: { label: "Random rows", ...rows },
  seed: { label: "Seed of random rows", type: "integer" },
  max_cost: { label: "Max cost in US dollars", type: "number", exclusiveMinimum: 0 },
  timeout_s: { label: "Max seconds for a row", type: "number", exclusiveMinimum: 0 },
  max_failures: { label: "Max failed rows", type: "number", minimum: 0, description: "Below 1: a share." },
  dedupe: { label: "Run equal rows once", type: "boolean" },
  reuse: { label: "Take results of earlier batches", type: "boolean" },
};

export async function show(main, { params, signal }) {
  const { agents } = await get("agents", signal);
  if (!agents.length) return fill(main, title("New batch"), h("p.empty", "There are no agents yet."));
  const view = new NewBatch(agents, params.get("agent") ?? session.get("batch agent"), signal);
  view.source = await chooser(() => view.report(view.setRows()));
  signal.throwIfAborted(); // reading the stored file cannot be cancelled
  main.append(...view.nodes());
  await view.setAgent();
}

class NewBatch {
  constructor(agents, first, signal) {
    this.signal = signal;
    this.loading = this.checking = new AbortController();
    signal.addEventListener("abort", () => {
      this.loading.abort();
      this.checking.abort();
    });
    const names = agents.map(({ name }) => name);
    this.agentChoice = select(names, first, { onchange: () => this.changeAgent() });
    this.inputNames = h("p.quiet");
    this.columns = h("section");
    this.files = new TableFiles(() => this.recheck(), signal);
    this.sample = h("tbody");
    this.needed = h("section", { "aria-label": "Inputs without a column" });
    this.others = h("section");
    this.check = h("section", { "aria-label": "Check" });
    this.start = h("section");
    const ofFile = (options, name) =>
      select(options, session.get(name), {
        onchange: ({ target }) => {
          session.set(name, target.value);
          this.report(this.setRows());
        },
      });
    const decimals = [
      [".", "point: 0.5"],
      [",", "comma: 0,5"],
    ];
    this.decimal = ofFile(decimals, "batch decimal");
    this.encoding = ofFile(ENCODINGS, "batch encoding");
    this.makeStart();
  }

  nodes() {
    const agent = withLabel("Agent", this.agentChoice);
    agent.append(this.inputNames);
    return [
      title("New batch"),
      aboutBatches(),
      h("section", agent),
      h("section", h("h2", "Rows"), this.source.node, this.ofCSV()),
      this.columns,
      this.files.node,
      this.needed,
      this.others,
      this.check,
      this.start,
    ];
  }

  ofCSV() {
    const fields = [withLabel("Decimals", this.decimal), withLabel("Encoding of a file", this.encoding)];
    const open = this.decimal.value !== CSV_DEFAULTS.decimal || this.encoding.value !== CSV_DEFAULTS.encoding;
    return h("details", { open }, h("summary", "Numbers and encoding of CSV"), h("div.columns", fields));
  }

  report(work) {
    work.catch((error) => {
      if (error.name !== "AbortError" && !this.signal.aborted) fill(this.check, problem(error));
    });
  }

  // Step 1: the agent

  changeAgent() {
    updateAddress("new-batch", { agent: this.agentChoice.value });
    this.report(this.setAgent());
  }

  async setAgent() {
    const name = this.agentChoice.value;
    session.set("batch agent", name);
    const agent = await get(`agents/${encodeURIComponent(name)}`, this.signal),
      last = await lastAgents(agent, this.signal);
    if (this.agentChoice.value !== name) return; // another agent was chosen in the meantime
    this.agent = agent;
    this.schema = agent.input_schema;
    this.outputs = outputsOf(last);
    const inputs = Object.keys(this.schema.properties ?? {}).map(
      (input) => `${input}${this.schema.required?.includes(input) ? "" : " (optional)"}`,
    );
    fill(this.inputNames, `Inputs: ${inputs.join(", ") || "none"}.`);
    this.report(this.setRows()); // rows that are chosen meanwhile stop it
  }

  // Step 2: the rows

  async setRows() {
    this.loading.abort();
    const { signal } = (this.loading = new AbortController());
    if (!this.schema) return; // called again when the agent is loaded
    const rows = this.source.rows();
    if (!rows) return this.clear();
    this.checking.abort();
    this.tryButton.disabled = this.startButton.disabled = this.isLoading = true; // it would start the previous rows
    const encoding = rows.name ? this.encoding.value : "utf-8"; // pasted text has none
    const format = { decimal: this.decimal.value, encoding, ...(await formatOf(rows, encoding)) },
      head = await headOf(rows, format);
    signal.throwIfAborted();
    const columns = await this.columnsOf(head, format, signal);
    Object.assign(this, { given: { rows, format }, rows, format, head, isLoading: false });
    const before = stored(`batch mapping ${this.agent.name}`) ?? {};
    this.mapping = new Mapping(columns, this.schema, this.outputs, before);
    this.drawColumns();
    this.drawFields();
  }

  async columnsOf(head, format, signal) {
    const options = { agent_name: this.agent.name, on_extra: "ignore", ...optionsOf({ ...format, encoding: "utf-8" }) };
    try {
      return (await checkRows(head, format, options, { signal })).columns;
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      return []; // the check of all rows shows why
    }
  }

  clear() {
    this.checking.abort();
    for (const part of [this.columns, this.files.node, this.needed, this.others, this.check, this.start]) fill(part);
    this.needed.classList.remove("problem");
  }

  // Step 3: the columns

  drawColumns() {
    fill(this.sample);
    const { columns } = this.mapping;
    if (!columns.length) return fill(this.columns);
    const head = (name) => [name || "(no name)", h("br"), this.choiceOf(name)];
    const { kind, delimiter } = this.format;
    const cells = delimiter ? `, cells separated by ${DELIMITERS[delimiter]}` : "";
    return fill(
      this.columns,
      h("h2", "Columns"),
      quiet(`${kind.toUpperCase()}${cells}. These are the first rows. Choose the input for each column:`),
      wide("The first rows", table(columns.map(head), this.sample)),
    );
  }

  choiceOf(name) {
    const words = { [KEPT]: "(kept in the results)", [DROPPED]: "(ignored)" };
    const options = this.mapping.choices(name).map((choice) => [choice, words[choice] ?? choice]);
    return select(options, this.mapping.chosen[name], {
      class: "small",
      "aria-label": `Column ${name} maps to`,
      "data-column": name,
      onchange: ({ target }) => this.map(name, target.value),
    });
  }

  map(name, input) {
    this.mapping.chosen[name] = input;
    session.set(`batch mapping ${this.agent.name}`, JSON.stringify(this.mapping.chosen));
    this.drawFields();
  }

  drawSample(rows) {
    const row = (each) => h("tr", ...this.mapping.cells(each).map((value) => h("td", short(value))));
    fill(this.sample, rows.slice(0, SHOWN_ROWS).map(row));
  }

  /** Draw the inputs without a column: choose a column, or enter one value for every row. */
  drawFields() {
    const unmapped = this.mapping.unmapped(),
      missing = this.mapping.missing();
    const optional = unmapped.filter((name) => !missing.includes(name));
    const before = stored(`statics ${this.agent.name}`) ?? {},
      open = optional.some((name) => name in before);
    this.fields = [this.formOf(missing, before, true), this.formOf(optional, before, false)];
    const [needed, others] = this.fields.map(({ node }) => h("div", { oninput: () => this.changed() }, node));
    fill(
      this.needed,
      missing.length > 0 && [
        h("h2", `There is no column for ${listed(missing)}`),
        h("p", "Choose a column, or enter one value for every row."),
        h("div.columns", ...missing.map((input) => this.columnFor(input)), needed),
      ],
    );
    fill(
      this.others,
      this.mapping.columns.length > 0 &&
        unmapped.length > missing.length &&
        h("details", { open }, h("summary", "Same value for every row"), others),
    );
    this.recheck();
  }

  formOf(names, before, isRequired) {
    const properties = names.map((name) => {
      const property = this.schema.properties[name];
      if (isRequired) return [name, property];
      const shown = "default" in property ? `Default: ${JSON.stringify(property.default)}.` : "";
      const description = [property.description, shown].filter(Boolean).join(" ");
      return [name, { ...property, default: undefined, description }];
    });
    const schema = { ...this.schema, properties: Object.fromEntries(properties), required: isRequired ? names : [] };
    return form(schema, before);
  }

  columnFor(input) {
    const unused = this.mapping.unused();
    const choose = ({ target }) => {
      this.map(target.value, input);
      const control = this.columns.querySelector(`[data-column="${CSS.escape(target.value)}"]`);
      control.value = input;
      control.focus();
    };
    const options = [["", unused.length ? "Choose …" : "No columns left"], ...unused];
    return withLabel(`Column for ${input}`, select(options, "", { disabled: !unused.length, onchange: choose }));
  }

  changed() {
    const statics = this.statics();
    if (statics) {
      session.set(`statics ${this.agent.name}`, JSON.stringify(statics));
      for (const fields of this.fields) fields.clear();
    }
    this.recheck();
  }

  /** Return the inputs with the same value in every row, or null if a field has an error (which it shows). */
  statics() {
    try {
      const read = Object.assign({}, ...this.fields.map((fields) => fields.read()));
      return Object.fromEntries(Object.entries(read).filter(([, value]) => value !== ""));
    } catch {
      return null;
    }
  }

  // Step 4: the check

  /** Check all rows again, or only show the first rows while an input is missing. */
  recheck() {
    this.checking.abort();
    const { signal } = (this.checking = new AbortController());
    this.found = null;
    this.canStart = false;
    const entered = this.statics();
    const missing = this.mapping.missing().filter((name) => !(name in (entered ?? {})));
    this.needed.classList.toggle("problem", missing.length > 0);
    fill(this.check);
    if (missing.length) fill(this.start);
    else this.drawStart();
    const isComplete = entered !== null && !missing.length;
    const statics = { ...Object.fromEntries(missing.map((name) => [name, null])), ...entered };
    this.report(this.checkAll(statics, isComplete, signal));
  }

  async checkAll(statics, isFilled, signal) {
    await pause(CHECK_DELAY_MS, signal);
    const resolved = await this.files.resolve(this.given, this.mapping, this.schema);
    signal.throwIfAborted();
    Object.assign(this, resolved ?? this.given);
    const options = this.options(statics),
      isComplete = isFilled && resolved !== null;
    if (!isComplete || this.head !== this.rows) {
      const ofHead = options.encoding ? { ...options, encoding: "utf-8" } : options;
      const { rows } = await checkRows(this.head, this.format, ofHead, { signal });
      this.drawSample(rows);
      this.canStart = isComplete && rows.length > 0;
      if (!isComplete) return;
      this.drawStart();
    }
    const onProgress = this.drawProgress();
    try {
      this.found = await checkRows(this.rows, this.format, options, { signal, onProgress });
      this.drawSample(this.found.rows);
      this.drawCheck();
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      this.canStart = false;
      this.drawRejection(this.check, error, "The rows cannot be read:");
    }
    this.drawStart();
  }

  drawProgress() {
    const bar = h("progress", { max: this.rows.size, value: 0 }),
      words = h("span", { role: "status" }, "Checking the rows …");
    fill(this.check, h("h2", "Check"), h("label", words, " ", bar));
    return (bytes) => {
      bar.value = bytes;
    };
  }

  drawCheck() {
    const [isValid, words] = summary(this.found, this.format.kind);
    const sign = h("span", { "aria-hidden": "true" }, isValid ? "✓ " : "✕ ");
    fill(this.check, h("h2", "Check"), h("p", { role: "status" }, sign, words), errorTable(this.found.errors));
  }

  drawRejection(place, { title, message, errors, requestId }, words) {
    const ofRows = errors.filter((error) => error.line);
    const others = errors.filter((error) => !error.line);
    const shown = problem({ title, message: ofRows.length ? words : message, errors: others, requestId });
    fill(place, shown, errorTable(ofRows));
  }

  // Step 5: start

  makeStart() {
    this.invalid = select(
      [
        ["reject", "reject the batch"],
        ["skip", "fail these rows and run the others"],
      ],
      session.get("batch invalid"),
    );
    this.invalid.addEventListener("change", () => {
      session.set("batch invalid", this.invalid.value);
      this.drawStart();
    });
    this.more = form({ properties: MORE }, stored("batch options"));
    this.more.node.addEventListener("change", () => keep("batch options", this.more));
    this.startError = h("div");
    this.upload = h("div");
    this.startHint = h("p.quiet");
    const starting = (options) => busyWhile(() => this.startBatch(options));
    this.startButton = button("Start the batch", starting(), { class: "primary" });
    this.tryButton = button(`Try ${TRIED_ROWS} rows first`, starting({ sample: TRIED_ROWS }));
  }

  drawStart() {
    const { found } = this;
    const isStopped = found && (!found.ok || (found.invalid_items > 0 && this.invalid.value === "reject"));
    this.tryButton.disabled = this.startButton.disabled = this.isLoading || (found ? isStopped : !this.canStart);
    fill(
      this.startHint,
      isStopped
        ? "Fix the rows or the columns first, or run only the valid rows."
        : !found && this.canStart
          ? "You can start before the check is complete."
          : "",
    );
    if (this.start.contains(this.startButton)) return;
    const hasMore = !["{}", null].includes(session.get("batch options"));
    fill(
      this.start,
      h("h2", "Start"),
      withLabel("Invalid rows", this.invalid),
      h("details", { open: hasMore }, h("summary", "More options"), this.more.node),
      this.startError,
      this.upload,
      actions(
        this.startButton,
        this.tryButton,
        button("Copy as curl", () => this.copyCurl()),
      ),
      this.startHint,
    );
  }

  /** The options of a check. It always counts invalid rows, even if they reject the batch. */
  options(statics) {
    const mapping = this.mapping.asOption();
    return {
      agent_name: this.agent.name,
      on_invalid: "skip",
      on_extra: "keep",
      ...(Object.keys(mapping).length ? { input_mapping: JSON.stringify(mapping) } : {}),
      ...(Object.keys(statics).length ? { static_inputs: JSON.stringify(statics) } : {}),
      ...optionsOf(this.format),
    };
  }

  startOptions() {
    for (const fields of [...this.fields, this.more])
      try {
        fields.read();
      } catch (error) {
        const control = fields.error(error.pointer, error.message);
        const hidden = control?.closest("details");
        if (hidden) hidden.open = true; // otherwise it cannot have the focus
        control?.focus();
        return null;
      }
    return { ...this.options(this.statics()), on_invalid: this.invalid.value, ...this.more.read() };
  }

  async startBatch(first) {
    fill(this.startError);
    const chosen = this.startOptions();
    if (!chosen) return;
    const options = { ...chosen, ...first };
    if (!this.found) {
      this.checking.abort(); // the server checks the rows during the upload
      fill(this.check);
    }
    this.isLoading = true; // the other button would start the rows again
    this.drawStart();
    const { size } = this.rows;
    const bar = h("progress", { max: size, value: 0 }),
      words = h("span", { role: "status" }, "Sending the rows …");
    fill(this.upload, h("label", words, bar));
    const onProgress = (bytes) => {
      bar.value = bytes;
      if (bytes >= size) fill(words, "The server stores the rows …");
    };
    try {
      const more = { signal: this.signal, onProgress, headers: idempotencyKey() };
      const batch = JSON.parse(await sendRows(this.rows, this.format, options, more));
      for (const name of [`batch mapping ${this.agent.name}`, "batch options"]) session.set(name, null);
      await this.source.clear();
      go(`batch/${batch.batch_id}`);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      this.drawRejection(this.startError, error, "The batch has not started:");
    } finally {
      this.isLoading = false;
      this.drawStart();
      fill(this.upload);
    }
  }

  async copyCurl() {
    const options = this.startOptions();
    if (!options) return;
    const file = quoted("@" + (this.rows.name ?? `rows.${this.format.kind}`));
    const path = `run/batch?${new URLSearchParams(options)}`;
    await copyCurl(path, MEDIA_TYPES[this.format.kind], `--data-binary ${file}`);
  }
}

/** The options of a CSV file that are not the defaults. */
const optionsOf = (format) =>
  Object.fromEntries(
    Object.keys(CSV_DEFAULTS)
      .filter((name) => format.kind === "csv" && format[name] !== CSV_DEFAULTS[name])
      .map((name) => [name, format[name]]),
  );
const listed = (names) => names.map((name) => `“${name}”`).join(", ");

function short(value) {
  const text = textOf(value);
  return text.length > 120 ? `${text.slice(0, 120)} …` : text;
}
