// One turn of a chat: what the user has said, and the run that answers it.

import { link } from "./address.js";
import { get, post } from "./api.js";
import { actions, button, fact, fill, h, wide } from "./dom.js";
import { events } from "./events.js";
import { textOf } from "./json.js";
import { busyWhile, problem } from "./notices.js";
import { questions } from "./question.js";
import { failure, newer, spent } from "./record.js";
import { Output, Steps } from "./steps.js";
import { readable } from "./value.js";
import { badge, between, duration, isBusy, isFinal } from "./words.js";

/** The text of an answer: that of its only output, or else the JSON of all. */
export function answerOf(result) {
  const values = Object.values(result ?? {});
  return textOf(values.length === 1 && typeof values[0] === "string" ? values[0] : result);
}

export class Turn {
  isStale = false; // the record may have more than the events
  hasFailed = false; // whether its record could not be loaded
  wasOpen = false;
  stream = null;
  isAnswer = true; // whether the agent that writes now may end the run
  steps = new Steps();
  output = new Output();
  details = h("details", h("summary", "Steps"), this.steps.node);
  outcome = h("div.reply");
  foot = h("dl.facts");

  /** `said` is the text of the user, `endsRun(name)` whether an agent may end the run. `changed(turn)` is called when the
   * status has changed. `box` gets the focus if its element in the turn is gone. */
  constructor(run, { said, endsRun, say, changed, box, signal }) {
    Object.assign(this, { run, endsRun, say, changed, box, signal, path: `run/${run.run_id}` });
    this.asked = questions(
      this.path,
      (answered) => {
        this.set(answered);
        this.keepFocus();
      },
      signal,
    );
    const answer = h("div.answer", this.details, this.output.node, this.outcome, this.asked.node, this.foot);
    this.node = h("li", { tabindex: "-1" }, h("p.said.text", h("span.visually-hidden", "You: "), said), answer);
  }

  get isOpen() {
    return !this.hasFailed && !isFinal(this.run.status);
  }

  get isBusy() {
    return !this.hasFailed && isBusy(this.run.status);
  }

  set(run) {
    this.run = newer(this.run, run);
    this.draw();
  }

  async load() {
    this.isStale = false;
    this.set(await get(this.path, this.signal));
    this.steps.draw(this.run);
  }

  async show() {
    this.hasFailed = false;
    await this.load().catch((error) => this.fail(error));
  }

  fail(error) {
    if (this.signal.aborted) return;
    this.hasFailed = true;
    this.state = null;
    fill(this.outcome, problem(error, error.status === 404 ? null : () => this.show()));
    this.changed(this);
  }

  /** Show the run while it is written, until it ends or `leave` is called. */
  async follow() {
    if (this.stream) return;
    this.stream = new AbortController();
    const signal = AbortSignal.any([this.signal, this.stream.signal]);
    try {
      while (this.isBusy) {
        for await (const event of events(`${this.path}/events`, signal)) this.on(event);
        await this.load();
      }
    } catch (error) {
      if (!signal.aborted) this.fail(error);
    }
    this.stream = null;
    if (!this.signal.aborted) this.changed(this);
  }

  leave() {
    if (!isFinal(this.run.status)) this.stream?.abort();
  }

  /** Move the focus if its element is gone. */
  keepFocus() {
    if (document.activeElement !== document.body) return;
    (this.asked.node.querySelector("input, select, textarea, button") ?? this.box).focus();
  }

  on({ name, data }) {
    if (isFinal(this.run.status) && name.startsWith("output.")) return; // its outcome is shown
    const isOwn = !data.call_id;
    if (isOwn && data.agent_name) this.isAnswer = this.endsRun(data.agent_name);
    if (name === "open") {
      this.steps.reconnect();
      this.output.clear(); // the server sends it again
    } else if (name === "run.started" || name === "run.waiting") {
      const status = name.slice(4).replace("started", "running");
      if (status === "waiting") this.isStale = true;
      if (status === "waiting" || this.run.status === "starting") this.set({ ...this.run, ...data, status });
    } else if (name.startsWith("output.") && isOwn && this.isAnswer) this.output.on(name, data);
    else if (/^(step|call|output)\./.test(name)) {
      if (name === "step.started") this.output.clear();
      if (name === "step.completed" || this.run.status === "waiting") this.isStale = true;
      if (name.startsWith("call.") && data.kind !== "model") this.details.open = true;
      this.steps.on(name, data);
    }
  }

  async cancel() {
    this.set(await post(`${this.path}/cancel`, undefined, { signal: this.signal }));
  }

  tick() {
    if (isFinal(this.run.status)) return;
    this.steps.tick(this.run);
    this.drawFoot();
    if (this.isStale) this.load().catch(() => {});
  }

  draw() {
    const hadFocus = this.node.contains(document.activeElement);
    const { status, attempt, result, error } = this.run;
    this.asked.draw(this.run);
    this.drawFoot();
    const state = `${status} ${attempt} ${result === undefined} ${Boolean(this.run.waiting_for?.length)}`;
    if (state !== this.state) {
      this.state = state;
      this.node.className = this.isBusy ? "busy" : "";
      if (isFinal(status)) this.output.clear();
      if (this.run.waiting_for?.length) this.say("The answer waits for you.");
      const isKnown = status !== "completed" || result !== undefined; // not that of a list
      if (isKnown && isFinal(status) && this.wasOpen) this.say(error ?? (result ? answerOf(result) : "The run was cancelled."));
      this.wasOpen = !isFinal(status) || (this.wasOpen && !isKnown);
      fill(this.outcome, isFinal(status) && this.drawOutcome());
      this.changed(this);
    }
    if (hadFocus) this.keepFocus();
  }

  drawOutcome() {
    const { status, result } = this.run;
    if (status === "completed") {
      if (result === undefined) return null; // of a list
      const text = answerOf(result);
      return text === textOf(result) ? wide("Answer", readable(result)) : h("p", readable(text));
    }
    const retry = busyWhile(async () => {
      try {
        this.set(await post(`${this.path}/retry`, undefined, { signal: this.signal }));
      } catch (error) {
        if (error.status !== 409) throw error; // somebody else has retried it
      }
      this.steps.clear();
      await this.show();
      this.keepFocus();
    });
    const words = status === "failed" ? "The run failed" : "The run was cancelled";
    return [failure(this.run, words), actions(button("Retry", retry))];
  }

  drawFoot() {
    const { run_id, status, started_at, completed_at } = this.run;
    fill(
      this.foot,
      status !== "completed" && fact("Status", badge(status)),
      started_at && fact("Duration", duration(between(started_at, completed_at))),
      spent(this.run),
      fact("Run", h("a", { href: link(`run/${run_id}`) }, "details")),
    );
  }
}
