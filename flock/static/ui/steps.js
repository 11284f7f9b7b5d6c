// The steps of a run: their calls, their output while it is written, and their results.

import { fill, h, quiet, wide } from "./dom.js";
import { readable } from "./value.js";
import { badge, between, count, duration, isFinal, when } from "./words.js";

/** A page with more calls in a step would be slow. */
const MAX_CALLS = 500;

/** The list of steps. It is drawn from the record of the run, and live from its events. */
export class Steps {
  node = h("ol.steps", { "aria-label": "Steps" });
  steps = [];
  /** the position of the step of the last event; a piece of its text does not say it */
  current = 0;

  clear() {
    this.steps = [];
    this.current = 0;
    fill(this.node);
  }

  at(position) {
    while (this.steps.length <= position) {
      if (!this.steps.length) fill(this.node);
      const [started_at] = [this.started_at, this.steps.at(-1)?.completed_at].filter(Boolean).sort().reverse();
      const step = new Step(this.steps.length, started_at);
      this.steps.push(step);
      this.node.append(step.node);
    }
    return this.steps[position];
  }

  draw(run) {
    const { steps, calls, agent_name } = run;
    this.started_at = run.started_at;
    steps.forEach((step, position) => this.at(position).set(step));
    if (calls) this.at(steps.length).set({ calls, agent_name: steps.length ? undefined : agent_name });
    if (isFinal(run.status) && !this.steps.length) fill(this.node, h("li.quiet", "No steps finished."));
    this.tick(run);
  }

  on(name, data) {
    const step = this.at(data.position ?? this.current);
    this.current = step.position;
    if (name.startsWith("step.")) step.set(data);
    else if (name.startsWith("call.")) step.setCall(data);
    else step.outputOf(data).on(name, data);
  }

  /** The server sends the output so far again on each connection. */
  reconnect() {
    for (const step of this.steps) step.clearOutput();
  }

  tick({ status }) {
    for (const step of this.steps) if (!step.completed_at) step.draw(status);
  }
}

class Step {
  calls = new Map();
  hiddenCalls = new Set();
  output = new Output();
  head = h("div");
  list = h("ul.calls", { "aria-label": "Calls" });
  more = h("div");
  result = h("div");

  constructor(position, started_at) {
    this.position = position;
    this.agent_name = `Step ${position + 1}`;
    this.started_at = started_at ?? new Date().toISOString();
    this.node = h("li", this.head, this.list, this.more, this.output.node, this.result);
  }

  set({ agent_name = this.agent_name, started_at = this.started_at, completed_at, result, calls = [] }) {
    const byStart = (a, b) => (a.started_at < b.started_at ? -1 : 1);
    for (const call of [...calls].sort(byStart)) this.setCall(call);
    const isNew = completed_at && completed_at !== this.completed_at;
    Object.assign(this, { agent_name, started_at, completed_at: completed_at ?? this.completed_at });
    if (isNew) {
      this.clearOutput();
      const box = wide(`Result of step ${this.position + 1}`, readable(result));
      fill(this.result, h("details", h("summary", "Result"), box));
    }
    this.draw("running");
  }

  setCall(data) {
    const isKnown = this.calls.has(data.call_id);
    if (isKnown || this.calls.size < MAX_CALLS) return this.callOf(data.call_id).set(data);
    this.hiddenCalls.add(data.call_id);
    fill(this.more, quiet(`… and ${count(this.hiddenCalls.size, "more call")}. The API returns all.`));
  }

  /** The call with this id. A call made by another call is below it, also if the other one is only known later. */
  callOf(id) {
    if (this.calls.has(id)) return this.calls.get(id);
    const call = new Call();
    call.node.dataset.id = id;
    const list = this.callerOf(id)?.list ?? this.list;
    call.list.append(...[...list.children].filter(({ dataset }) => dataset.id.startsWith(`${id}~`)));
    list.append(call.node);
    this.calls.set(id, call);
    return call;
  }

  callerOf(id) {
    const caller = id.slice(0, Math.max(0, id.lastIndexOf("~")));
    return caller && (this.calls.get(caller) ?? this.callerOf(caller));
  }

  outputOf({ call_id, agent_name }) {
    if (!call_id) return this.output;
    if (!this.calls.has(call_id)) this.callOf(call_id).set({ kind: "agent", name: agent_name });
    return this.callOf(call_id).output;
  }

  clearOutput() {
    for (const { output } of [this, ...this.calls.values()]) output.clear();
  }

  draw(status) {
    const isOver = this.completed_at || isFinal(status);
    for (const call of this.calls.values()) call.draw(isOver ? null : status); // the last reply has no end of its own
    this.node.className = this.completed_at ? "done" : isOver || status === "waiting" ? "" : "busy";
    const took = duration(between(this.started_at, this.completed_at));
    const state = this.completed_at
      ? `done in ${took}`
      : isOver
        ? "not finished"
        : status === "waiting"
          ? "waiting"
          : `running for ${took}`;
    fill(this.head, h("strong", this.agent_name), " ", h("span.quiet", state, ", started ", when(this.started_at)));
  }
}

class Call {
  output = new Output();
  list = h("ul.calls");
  summary = h("summary");
  content = h("div");
  details = h("details", { ontoggle: () => this.drawContent() }, this.summary, this.content);
  error = h("p.error");
  node = h("li", this.details, this.error, this.output.node, this.list);
  data = {};

  set(data) {
    if (data.completed_at && data.completed_at === this.data.completed_at) return;
    this.data = { ...this.data, ...data };
    if (data.completed_at) this.output.clear();
    fill(this.error, data.error);
    this.drawSummary();
    this.drawContent();
  }

  draw(status) {
    if (!this.data.completed_at) this.drawSummary(status);
  }

  drawSummary(open = "running") {
    const { kind, name, started_at, completed_at, error, usage, answered_by } = this.data;
    fill(
      this.summary,
      h("span.quiet", kind),
      " ",
      h("strong", name),
      " ",
      error ? badge("failed") : completed_at ? badge("completed") : open && badge(open),
      h(
        "span.quiet",
        started_at && ` ${duration(between(started_at, completed_at))}`,
        usage && `, ${count(usage.input_tokens + usage.output_tokens, "token")}`,
        answered_by && `, answered by ${answered_by}`,
      ),
    );
  }

  /** Draw the arguments and the result when they are opened: a step can have many. */
  drawContent() {
    if (!this.details.open) return;
    const { name, result, completed_at, error } = this.data;
    const members = { Arguments: this.data.arguments, ...(completed_at && !error ? { Result: result } : {}) };
    const row = ([name, value]) => {
      const shown = value === undefined ? h("span.quiet", "Not shown, because it is long.") : readable(value);
      return h("tr", h("th", { scope: "row" }, name), h("td", shown));
    };
    fill(this.content, wide(`Details of ${name}`, h("table.value", h("tbody", Object.entries(members).map(row)))));
  }
}

/** The output of an agent while it is written: a table of its fields. */
export class Output {
  cells = new Map();
  body = h("tbody");
  node = h("table.value.output", { hidden: true }, this.body);

  on(name, { field, text, value, output = {} }) {
    if (name === "output.delta") this.cellOf(field).querySelector(".text").append(text);
    else if (name === "output.value") this.set(field, value);
    else this.clear();
    for (const [field, value] of Object.entries(output)) this.set(field, value);
  }

  clear() {
    this.cells.clear();
    fill(this.body);
    this.node.hidden = true;
  }

  set(field, value) {
    fill(this.cellOf(field), typeof value === "string" ? h("span.text", value) : readable(value));
  }

  cellOf(field) {
    if (!this.cells.has(field)) {
      const cell = h("td", h("span.text"));
      this.cells.set(field, cell);
      this.body.append(h("tr", h("th", { scope: "row" }, field), cell));
      this.node.hidden = false;
    }
    return this.cells.get(field);
  }
}
