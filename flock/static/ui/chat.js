// The view of a chat with an agent. A conversation is a session of the server, and its turns are runs.

import { link, updateAddress } from "./address.js";
import { get, idempotencyKey, post } from "./api.js";
import { actions, button, fact, fill, h, title, withLabel } from "./dom.js";
import { chatInput, form, sending } from "./form.js";
import { parse, textOf } from "./json.js";
import { busyWhile, notify } from "./notices.js";
import { announcer, spent } from "./record.js";
import { session } from "./storage.js";
import { Turn, answerOf } from "./turn.js";
import { every, pause } from "./wait.js";
import { badge, when } from "./words.js";

/** Each turn that is shown is loaded with its calls. */
const TURNS_PER_PAGE = 10;
/** The conversations of that many runs are listed, each by the start of its last message. */
const RECENT_RUNS = 100;
const RECENT_CHARS = 100;
const MAX_TRIES = 5;
const REFRESH_MS = 5000;
/** How near the end of the page a reader is still there, and follows the answer. */
const NEAR_END_PX = 80;

export async function show(main, { id, signal }) {
  const [name, ...rest] = id.split("/");
  let session_id = rest.join("/");
  const toSession = (id) => link(`chat/${name}/${encodeURIComponent(id)}`);
  const agent = await get(`agents/${encodeURIComponent(name)}`, signal);
  const input = chatInput(agent.input_schema);
  const heading = (...more) =>
    title(`Chat with ${name}`, actions(more, h("a.button", { href: link(`agent/${name}`) }, "Form")));
  if (!input) {
    main.append(heading(), h("p.empty", "This agent does not take a text as its only input. Use its form."));
    return;
  }
  const turns = new Map(),
    log = h("ol.chat", { "aria-label": "Conversation" }),
    earlier = h("div"),
    live = announcer(0),
    totals = h("dl.facts");

  // The turns

  function saidIn(inputs) {
    const message = inputs[input.name];
    return textOf(Array.isArray(message) ? message.at(-1)?.content : message);
  }

  const list = (query) => get(`runs?${new URLSearchParams({ agent_name: name, ...query })}`, signal);
  const page = (more) => list({ session_id, include: "inputs", limit: TURNS_PER_PAGE, ...more });

  function add(run, inputs, place = "append") {
    if (isShown(run)) return;
    const said = saidIn(inputs);
    const endsRun = (name) => agent.graph.some(({ from, to }) => from === name && to === null);
    const turn = new Turn(run, { said, inputs, endsRun, say: live.say, changed, signal });
    turns.set(run.run_id, turn);
    log[place](turn.node);
    turn.draw();
    turn.follow();
  }

  /** Whether a run is shown. If it was retried elsewhere, it is shown again. */
  function isShown({ run_id, attempt }) {
    const turn = turns.get(run_id);
    if (turn && attempt > turn.run.attempt) turn.follow();
    return Boolean(turn);
  }

  /** Show what others have written in the session, if anything. */
  async function look() {
    const { runs } = session_id ? await list({ session_id, limit: 1 }) : { runs: [] };
    if (!runs.every(isShown)) await refresh();
  }

  async function refresh() {
    const isFirst = !turns.size;
    const { runs, next } = await page();
    if (isFirst) offerEarlier(next);
    for (const run of runs.reverse()) add(run, run.inputs);
  }

  function offerEarlier(next) {
    const after = new URLSearchParams(next?.split("?")[1]).get("after");
    const load = async () => {
      const { runs, next } = await page({ after });
      for (const run of runs) add(run, run.inputs, "prepend");
      offerEarlier(next);
    };
    fill(earlier, next && button("Earlier turns", load));
  }

  async function recent() {
    const { runs } = await list({ include: "inputs", limit: RECENT_RUNS });
    const newest = new Map();
    for (const run of runs) if (run.session_id && !newest.has(run.session_id)) newest.set(run.session_id, run);
    const item = ([id, { inputs, status, created_at }]) =>
      h("li", h("a", { href: toSession(id) }, saidIn(inputs).slice(0, RECENT_CHARS)), badge(status), when(created_at));
    return newest.size > 0 && h("section", h("h2", "Conversations"), h("ul.list.recent", [...newest].map(item)));
  }

  const busyTurns = () => [...turns.values()].filter((turn) => turn.isBusy);

  function changed(turn) {
    stop.hidden = !busyTurns().length;
    if (!turn.isBusy) sum();
    if (document.activeElement === document.body) box.focus(); // the button that was pressed is gone
  }

  let summing = null;
  async function sum() {
    summing ??= pause(100, signal).then(() => get(`session/${encodeURIComponent(session_id)}`, signal));
    const summary = await summing.catch(() => null);
    summing = null;
    if (summary) fill(totals, fact("Turns", summary.total_runs), spent(summary));
  }

  // The box

  const nameOfDraft = () => `chat ${name} ${session_id}`;
  /** The text in the box. After it was sent, also its request, so that a reload or a retry sends the same one again. */
  let draft = { text: "" };
  const keep = (next) => {
    draft = next;
    session.set(nameOfDraft(), next.text && JSON.stringify(next));
  };

  async function prepare(others) {
    let message = box.value;
    if (input.isList) {
      const completed = [...turns.values()].filter(({ run }) => run.status === "completed");
      const last = completed.sort((a, b) => (a.run.run_id < b.run.run_id ? -1 : 1)).at(-1);
      if (last && !last.run.result) await last.load();
      const answer = () => ({ role: "assistant", content: answerOf(last.run.result) });
      const before = last ? [...(last.inputs[input.name] ?? []), answer()] : [];
      message = [...before, { role: "user", content: message }];
    }
    keep({ text: "" });
    if (!session_id) fill(earlier);
    session_id ||= Object.values(idempotencyKey())[0];
    updateAddress(`chat/${name}/${encodeURIComponent(session_id)}`);
    const body = { agent_name: name, inputs: { ...others, [input.name]: message }, async_run: true, session_id };
    keep({ text: box.value, headers: idempotencyKey(), body });
  }

  /** Send the message. A request with its key may still be being accepted, from before a reload. */
  async function accept(tries = MAX_TRIES) {
    try {
      return await post("run/flock", draft.body, { canRetry: true, headers: draft.headers, signal });
    } catch (error) {
      if (error.status !== 409 || tries === 1) throw error;
    }
    await pause(1000, signal);
    return accept(tries - 1);
  }

  const submit = async () => {
    if (!box.value.trim() || box.readOnly) return;
    // The server executes the turns of a session one after the other. This one would need the answer before it.
    if (input.isList && !draft.body && busyTurns().length) notify("Wait for the answer, or stop it.");
    else await sendDraft({ currentTarget: send });
    if (more.querySelector("[aria-invalid]")) more.open = true;
  };

  const others = Object.entries(agent.input_schema.properties).filter(([each]) => each !== input.name);
  const fields = form({ ...agent.input_schema, properties: Object.fromEntries(others) });
  const { wrong, send: sendFields } = sending(fields, "/inputs");
  const sendDraft = sendFields(async (others) => {
    box.readOnly = true;
    try {
      if (!draft.body) await prepare(others);
      const run = await accept();
      const { inputs } = draft.body;
      keep({ text: "" });
      box.value = "";
      add(run, inputs);
      scrollTo(0, document.body.scrollHeight);
    } catch (error) {
      if (error.status < 500 && error.status !== 409) keep({ text: draft.text }); // it was not accepted
      if (error.status) error.message += " Your text is still in the box.";
      throw error;
    } finally {
      box.readOnly = false;
      box.focus();
    }
  });

  const box = h("textarea", {
    rows: 1,
    autofocus: true,
    enterkeyhint: "send",
    onkeydown: (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      submit();
    },
    oninput: () => keep({ text: box.value }),
  });
  const send = h("button.primary", "Send");
  const stop = button(
    "Stop",
    busyWhile(() => busyTurns()[0]?.cancel()),
    { hidden: true },
  );
  const more = h("details", { hidden: !others.length }, h("summary", "More inputs"), fields.node);
  const onsubmit = (event) => {
    event.preventDefault();
    submit();
  };

  main.append(
    heading(h("a.button", { href: link(`chat/${name}`) }, "New conversation")),
    totals,
    earlier,
    log,
    live.node,
    h(
      "form.composer",
      { onsubmit },
      wrong,
      more,
      h("div", withLabel(`Message to ${name}`, box), send, stop),
    ),
  );

  let isAtEnd = true;
  const toEnd = () => isAtEnd && scrollTo(0, document.body.scrollHeight);
  const noteScroll = () => {
    isAtEnd = innerHeight + scrollY > document.body.scrollHeight - NEAR_END_PX;
  };
  addEventListener("scroll", noteScroll, { signal });
  const growth = new ResizeObserver(toEnd);
  growth.observe(log);
  const clock = setInterval(() => turns.forEach((turn) => turn.tick()), 1000);
  signal.addEventListener("abort", () => {
    clearInterval(clock);
    growth.disconnect();
  });

  try {
    draft = parse(session.get(nameOfDraft())) ?? draft;
  } catch {
    /* there is none */
  }
  box.value = draft.text;
  if (session_id) await refresh();
  else fill(earlier, await recent());
  if (draft.body) submit(); // the page was closed before the answer came
  pause(REFRESH_MS, signal)
    .then(() => every(REFRESH_MS, look, signal))
    .catch(() => {});
}
