// One turn of a chat: what the user has said, and the run that answers it.

import { link } from "./address.js";
import { get, post } from "./api.js";
import { actions, button, fact, fill, h, wide } from "./dom.js";
import { events } from "./events.js";
import { textOf } from "./json.js";
import { busyWhile, problem } from "./notices.js";
import { questions } from "./question.js";
import { failure, spent } from "./record.js";
import { Output, Steps } from "./steps.js";
import { readable } from "./value.js";
import { badge, between, duration, isFinal } from "./words.js";

/** The text of an answer: that of its only output, or else the JSON of all. */
export function answerOf(result) {
  const values = Object.values(result ?? {});
  return textOf(values.length === 1 && typeof values[0] === "string" ? values[0] : result);
}

export class Turn {
  isStale = false; // the record may have more than the events
  isFollowed = false;
  isAnswer = true; // whether the agent that writes now may end the run
  steps = new Steps();
  output = new Output();
  details = h("details", h("summary", "Steps"), this.steps.node);
  outcome = h("div.reply");
  foot = h("dl.facts");

  /** `said` is the text of the user, `endsRun(name)` whether an agent may end the run. `changed(turn)` is called when the
   * status has changed. */
  constructor(run, { said, inputs, endsRun, say, changed, signal }) {
    Object.assign(this, { run, inputs, endsRun, say, changed, signal, path: `run/${run.run_id}` });
    this.asked = questions(
      this.path,
      (answered) => {
        this.run = answered;
        this.draw();
      },
      signal,
    );
    const answer = h("div.answer", this.details, this.output.node, this.outcome, this.asked.node, this.foot);
    this.node = h("li", h("p.said.text", h("span.visually-hidden", "You: "), said), answer);
  }

  get isBusy() {
    return this.run.status === "starting" || this.run.status === "running";
  }

  async load() {
    this.isStale = false;
    this.run = await get(this.path, this.signal);
    this.draw();
    this.steps.draw(this.run);
  }

  /** Load the run, and show it until it has ended. */
  async follow() {
    if (this.isFollowed) return;
    this.isFollowed = true;
    try {
      await this.load();
      const isLive = !isFinal(this.run.status);
      while (!isFinal(this.run.status)) {
        for await (const event of events(`${this.path}/events`, this.signal)) this.on(event);
        await this.load();
      }
      if (isLive) this.say(this.run.error ?? (this.run.result ? answerOf(this.run.result) : "The run was cancelled."));
    } catch (error) {
      if (!this.signal.aborted) fill(this.outcome, problem(error, error.status === 404 ? null : () => this.follow()));
    } finally {
      this.isFollowed = false;
    }
  }

  on({ name, data }) {
    const isOwn = !data.call_id;
    if (isOwn && data.agent_name) this.isAnswer = this.endsRun(data.agent_name);
    if (name === "open") {
      this.steps.reconnect();
      this.output.clear(); // the server sends it again
    } else if (name === "run.started" || name === "run.waiting") {
      const status = name.slice(4).replace("started", "running");
      if (status === "waiting") this.isStale = true;
      if (status === "waiting" || this.run.status === "starting") this.run = { ...this.run, ...data, status };
      this.draw();
    } else if (name.startsWith("output.") && isOwn && this.isAnswer) this.output.on(name, data);
    else if (/^(step|call|output)\./.test(name)) {
      if (name === "step.started") this.output.clear();
      if (name === "step.completed" || this.run.status === "waiting") this.isStale = true;
      if (name === "call.started" && data.kind !== "model") this.details.open = true;
      this.steps.on(name, data);
    }
  }

  async cancel() {
    this.run = await post(`${this.path}/cancel`, undefined, { signal: this.signal });
    this.draw();
  }

  tick() {
    if (isFinal(this.run.status)) return;
    this.steps.tick(this.run);
    this.drawFoot();
    if (this.isStale) this.load().catch(() => {});
  }

  draw() {
    const { status, attempt, result } = this.run;
    this.asked.draw(this.run);
    this.drawFoot();
    const state = `${status} ${attempt} ${result === undefined}`;
    if (state === this.state) return;
    this.state = state;
    this.node.className = this.isBusy ? "busy" : "";
    if (isFinal(status)) this.output.clear();
    if (status === "waiting") this.say("The answer waits for you.");
    fill(this.outcome, isFinal(status) && this.drawOutcome());
    this.changed(this);
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
        this.run = await post(`${this.path}/retry`, undefined, { signal: this.signal });
      } catch (error) {
        if (error.status !== 409) throw error; // somebody else has retried it
      }
      this.steps.clear();
      this.follow();
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
