// The view of a chat with an agent. A conversation is a session of the server, and its turns are runs.

import { link, updateAddress } from "./address.js";
import { get, idempotencyKey, post } from "./api.js";
import { actions, button, fact, fill, h, submitting, title, withLabel } from "./dom.js";
import { chatInput, form, sending } from "./form.js";
import { textOf } from "./json.js";
import { busyWhile } from "./notices.js";
import { announcer, spent } from "./record.js";
import { session, stored } from "./storage.js";
import { Turn, answerOf } from "./turn.js";
import { every, everySecond, pause } from "./wait.js";
import { badge, isBusy, when } from "./words.js";

/** Each turn that is shown is loaded with its calls. */
const TURNS_PER_PAGE = 10;
/** The conversations of that many runs are listed, each by the start of its last message. */
const RECENT_RUNS = 100;
const RECENT_CHARS = 100;
/** A page is shorter if its inputs are long. */
const RECENT_PAGES = 5;
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
  const page = (more) => list({ session_id, limit: TURNS_PER_PAGE, ...more });
  const pageAfter = ({ next }) => get(`runs?${next.split("?")[1]}`, signal);
  const inOrder = () => [...turns.values()].sort((a, b) => (a.run.run_id < b.run.run_id ? -1 : 1));

  function add(run) {
    if (isShown(run)) return;
    const said = saidIn(run.inputs);
    delete run.inputs; // they may have the whole conversation
    const endsRun = (name) => agent.graph.some(({ from, to }) => from === name && to === null);
    const turn = new Turn(run, { said, endsRun, say: live.say, changed, box, signal });
    const after = inOrder().find((each) => each.run.run_id > run.run_id);
    turns.set(run.run_id, turn);
    log.insertBefore(turn.node, after?.node ?? null);
    turn.draw();
    turn.show();
  }

  const addAll = ({ runs }) => runs.toReversed().forEach(add);

  /** Whether a run is shown. If it was retried elsewhere, it is shown again. */
  function isShown({ run_id, attempt }) {
    const turn = turns.get(run_id);
    if (turn && attempt > turn.run.attempt) turn.show();
    return Boolean(turn);
  }

  /** All turns up to this one are shown, or are among the earlier ones. */
  let seen = "";

  async function begin() {
    const found = await page({ include: "inputs" });
    seen = found.runs[0]?.run_id ?? "";
    addAll(found);
    offerEarlier(found);
  }

  /** Show what others have written in the session, and how the runs that are not followed are. */
  async function look() {
    if (session_id) await catchUp();
    for (const turn of inOrder()) if (turn.isOpen) await turn.show();
  }

  async function catchUp() {
    const goesOn = ({ runs, next }) => next && runs.at(-1).run_id > seen;
    let found = await page();
    const newest = found.runs[0]?.run_id ?? "";
    if (found.runs.filter(isShown).length < found.runs.length || goesOn(found)) found = await page({ include: "inputs" });
    addAll(found);
    while (goesOn(found)) addAll((found = await pageAfter(found)));
    seen = newest;
  }

  function offerEarlier(found) {
    const load = busyWhile(async () => {
      const more = await pageAfter(found);
      addAll(more);
      offerEarlier(more);
      (earlier.firstChild ?? turns.get(more.runs.at(-1)?.run_id)?.node)?.focus();
    });
    fill(earlier, found.next && button("Earlier turns", load));
  }

  async function recent() {
    const newest = new Map();
    let found = await list({ include: "inputs", limit: RECENT_RUNS });
    for (let pages = 1, count = 0; ; pages++, found = await pageAfter(found)) {
      for (const run of found.runs) if (run.session_id && !newest.has(run.session_id)) newest.set(run.session_id, run);
      count += found.runs.length;
      if (!found.next || count >= RECENT_RUNS || pages === RECENT_PAGES) break;
    }
    const item = ([id, { inputs, status, created_at }]) =>
      h("li", h("a", { href: toSession(id) }, saidIn(inputs).slice(0, RECENT_CHARS) || id), badge(status), when(created_at));
    return newest.size > 0 && h("section", h("h2", "Conversations"), h("ul.list.recent", [...newest].map(item)));
  }

  function changed(turn) {
    const hadFocus = document.activeElement === stop;
    stop.hidden = !toStop();
    if (hadFocus && stop.hidden) box.focus();
    if (!turn.isBusy) sum();
    followOne();
  }

  /** Follow the turn that runs, or else the next one: a browser has only six connections per host. */
  function followOne() {
    const busy = inOrder().filter((turn) => turn.isBusy);
    const followed = busy.find(isRunning) ?? busy[0];
    for (const turn of turns.values()) if (turn !== followed) turn.leave();
    followed?.follow();
  }

  const isRunning = ({ run }) => run.status === "running";

  function toStop() {
    const open = inOrder().filter((turn) => turn.isOpen);
    return open.find(isRunning) ?? open.find((turn) => turn.isBusy) ?? open.at(-1);
  }

  let isSumming = false,
    isOld = false;
  /** Show the sums. A response that is on its way may be older than the turn that has ended now. */
  async function sum() {
    isOld = true;
    if (isSumming) return;
    isSumming = true;
    try {
      while (isOld) {
        await pause(100, signal);
        isOld = false;
        const summary = await get(`session/${encodeURIComponent(session_id)}`, signal);
        fill(totals, fact("Turns", summary.total_runs), spent(summary));
      }
    } catch {
      /* the next turn that ends asks again */
    }
    isSumming = false;
  }

  // The box

  const nameOfDraft = () => `chat ${name} ${session_id}`;
  /** The text in the box. After it was sent, also its request, so that a reload or a retry sends the same one again. */
  let draft = stored(nameOfDraft()) ?? { text: "" };
  const keep = (next) => {
    draft = next;
    session.set(nameOfDraft(), next.text && JSON.stringify(next));
  };

  /** The messages of the last completed turn, also if somebody else has written it, and its answer. */
  async function history() {
    if (!session_id) return [];
    const newest = async (more) => (await page({ limit: 1, ...more })).runs[0];
    // The server executes the turns of a session one after the other. This one would need the answer before it.
    if (inOrder().some((turn) => turn.isBusy) || isBusy((await newest())?.status))
      throw new Error("Wait for the answer, or stop it.");
    const last = await newest({ status: "completed", include: "inputs,result" });
    return last ? [...(last.inputs[input.name] ?? []), { role: "assistant", content: answerOf(last.result) }] : [];
  }

  /** Make the request for the text in the box and the other inputs. */
  async function prepare(given) {
    const message = input.isList ? [...(await history()), { role: "user", content: box.value }] : box.value;
    keep({ text: "" });
    if (!session_id) fill(earlier);
    session_id ||= Object.values(idempotencyKey())[0];
    updateAddress(`chat/${name}/${encodeURIComponent(session_id)}`);
    const body = { agent_name: name, inputs: { ...given, [input.name]: message }, async_run: true, session_id };
    keep({ text: box.value, headers: idempotencyKey(), body });
    prepared = JSON.stringify(given);
  }

  const submit = async () => {
    if (!box.value.trim() || box.readOnly) return;
    await sendDraft({ currentTarget: send });
    if (more.querySelector("[aria-invalid]")) more.open = true;
  };

  const others = Object.entries(agent.input_schema.properties).filter(([each]) => each !== input.name);
  const fields = form({ ...agent.input_schema, properties: Object.fromEntries(others) }, draft.body?.inputs);
  const { wrong, read, send: sendFields } = sending(fields, "/inputs");
  /** The other inputs of the request that was made last, or of that from before a reload. */
  let prepared = JSON.stringify(read());
  const sendDraft = sendFields(async (given) => {
    box.readOnly = true;
    try {
      if (!draft.body || JSON.stringify(given) !== prepared) await prepare(given);
      const run = await post("run/flock", draft.body, { canRetry: true, headers: draft.headers, signal });
      const { inputs } = draft.body;
      keep({ text: "" });
      box.value = "";
      add({ ...run, inputs });
      scrollTo(0, document.body.scrollHeight);
    } catch (error) {
      if (error.status < 500) keep({ text: draft.text }); // it was not accepted
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
    oninput: () => keep({ text: box.value }),
  });
  const send = h("button.primary", "Send");
  const stop = button(
    "Stop",
    busyWhile(async () => {
      await toStop()?.cancel();
      if (stop.hidden && document.activeElement === document.body) box.focus();
    }),
    { hidden: true },
  );
  const more = h("details", { hidden: !others.length }, h("summary", "More inputs"), fields.node);

  main.append(
    heading(h("a.button", { href: link(`chat/${name}`) }, "New conversation")),
    totals,
    earlier,
    log,
    live.node,
    h(
      "form.composer",
      { onsubmit: submitting(submit) },
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
  signal.addEventListener("abort", () => growth.disconnect());
  everySecond(() => turns.forEach((turn) => turn.tick()), signal);

  box.value = draft.text;
  const found = await (session_id ? begin() : recent());
  if (!session_id) fill(earlier, found); // the first message may have been sent meanwhile
  if (draft.body) submit(); // the page was closed before the answer came
  pause(REFRESH_MS, signal)
    .then(() => every(REFRESH_MS, () => look().catch(() => {}), signal))
    .catch(() => {});
}
