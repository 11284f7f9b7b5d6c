import assert from "node:assert";
import { writeFileSync } from "node:fs";
import { HttpAgent } from "@ag-ui/client";

const [url, folder] = process.argv.slice(2);
const writing = [];
const { fetch } = globalThis;
// Each stream that ends is written for the validator, with the messages that the client has had before.
globalThis.fetch = async (at, init) => {
  const response = await fetch(at, init);
  const number = writing.length;
  const write = async (copy) => {
    const [begin, ...rest] = (await copy.text()).split("\n\n");
    const known = { type: "MESSAGES_SNAPSHOT", messages: JSON.parse(init.body).messages };
    const name = `${String(at).split("/").pop()}-${number}.sse`;
    writeFileSync(`${folder}/${name}`, [begin, `data: ${JSON.stringify(known)}`, ...rest].join("\n\n"));
  };
  if (init?.body && response.ok) writing.push(write(response.clone()).catch(() => {}));
  return response;
};
const open = (agent, more = {}) => new HttpAgent({ url: `${url}/ag-ui/${agent}`, ...more });
const say = (agent, content) => agent.addMessage({ id: crypto.randomUUID(), role: "user", content });
const text = (agent) => agent.messages.filter((message) => message.role === "assistant").at(-1).content;
const listed = async (name) => (await (await fetch(`${url}/runs?agent_name=${name}`)).json()).runs[0]?.status;

if (folder === "killed") {
  process.on("unhandledRejection", () => {}); // the client has one when its stream breaks
  const agent = open("hold");
  say(agent, "tea");
  let half;
  const running = agent.runAgent({}, { onTextMessageContentEvent: () => void (half ??= console.log("half")) });
  await running.catch(() => {});
  while ((await listed("hold").catch(() => {})) !== "failed") await new Promise((resolve) => setTimeout(resolve, 50));
  // The page is reloaded, with the messages that it has kept.
  const reloaded = open("hold", { threadId: agent.threadId, initialMessages: agent.messages });
  assert.equal(text(reloaded), "All ");
  say(reloaded, "milk");
  await reloaded.runAgent();
  const shown = reloaded.messages.filter((message) => message.role === "assistant").map((message) => message.content);
  assert.deepEqual(shown, ["All about milk"]);
  console.log("all of it");
  process.exit(0);
}
const tools = [{ name: "look", description: "Looks.", parameters: { type: "object", properties: { at: { type: "string" } } } }];

// Text, a second turn, and another answer in place of the last one
let agent = open("roles");
say(agent, "tea");
const types = [];
await agent.runAgent({}, { onEvent: ({ event }) => void types.push(event.type) });
assert.deepEqual([types[0], types.at(-1)], ["RUN_STARTED", "RUN_FINISHED"]);
assert.equal(text(agent), "user=tea");
say(agent, "more");
await agent.runAgent();
assert.equal(text(agent), "user=tea assistant=user=tea user=more");
const replaced = agent.messages.pop().id;
await agent.runAgent({ forwardedProps: { replaces: replaced.split("_")[1] } });
assert.equal(text(agent), "user=tea assistant=user=tea user=more");
assert.notEqual(agent.messages.at(-1).id, replaced);
assert.equal(agent.messages.length, 4);

// Reasoning, and a result that is no text
agent = open("thinker");
say(agent, "sky");
await agent.runAgent();
assert.deepEqual(agent.messages.map((message) => [message.role, message.content]).slice(1), [["reasoning", "The sky?"], ["assistant", "Blue."]]);
agent = open("mood");
say(agent, "a b");
await agent.runAgent();
assert.deepEqual(agent.state, { mood: "good", words: ["a", "b"] });

// A text that is taken back
agent = open("replaced");
say(agent, "tea");
const seen = [];
await agent.runAgent({}, { onTextMessageContentEvent: ({ event }) => void seen.push(event.delta) });
assert.deepEqual(seen, ["The first", "Another one"]);
assert.deepEqual(agent.messages.map((message) => message.role), ["user", "assistant", "tool", "assistant"]);
assert.equal(text(agent), "Another one");

// A called agent, which waits for an approval
agent = open("delegates");
say(agent, "pay");
const subagents = [];
const note = ({ event }) => void subagents.push([event.type, event.name ?? event.outcome?.type]);
const noted = { onSubagentStartedEvent: note, onSubagentFinishedEvent: note };
await agent.runAgent({}, noted);
const resolved = agent.pendingInterrupts.map(({ id }) => ({ interruptId: id, status: "resolved", payload: { approved: true } }));
await agent.runAgent({ resume: resolved }, noted);
const works = ["SUBAGENT_STARTED", "payer"];
assert.deepEqual(subagents, [works, ["SUBAGENT_FINISHED", "suspended"], works, ["SUBAGENT_FINISHED", undefined]]);
assert.equal(text(agent), "paid 3");
const [called, paid] = agent.messages.filter((message) => message.toolCalls);
assert.equal(paid.subagentRunId, called.toolCalls[0].id);

// An approval
agent = open("payer");
say(agent, "pay");
await agent.runAgent();
const [interrupt] = agent.pendingInterrupts;
assert.equal(interrupt.reason, "approval");
const asked = agent.messages.find((message) => message.toolCalls?.[0].id === interrupt.toolCallId);
assert.deepEqual(JSON.parse(asked.toolCalls[0].function.arguments), { amount: 3 });
await agent.runAgent({ resume: [{ interruptId: interrupt.id, status: "resolved", payload: { approved: true } }] });
assert.equal(text(agent), "paid 3");
assert.equal(agent.messages.find((message) => message.role === "tool").content, '"paid 3"');
assert.equal(agent.pendingInterrupts.length, 0);

// Tools of the client
agent = open("guide");
say(agent, "look");
let pending;
await agent.runAgent({ tools }, { onRunFinishedEvent: ({ event }) => void (pending = event.outcome.pendingToolCallIds) });
assert.equal(pending.length, 2);
for (const message of agent.messages.filter((message) => message.toolCalls)) {
  const [{ id, function: { arguments: given } }] = message.toolCalls;
  agent.addMessage({ id: crypto.randomUUID(), role: "tool", toolCallId: id, content: `${JSON.parse(given).at} is blue` });
}
await agent.runAgent({ tools });
assert.equal(text(agent), "sea is blue");

// Errors, and a stop
agent = open("fail");
say(agent, "tea");
let failure;
await agent.runAgent({}, { onRunErrorEvent: ({ event }) => void (failure = event) }).catch(() => {});
assert.equal(failure.code, "agent_error");
assert.match(failure.message, /^no The run is /);
await assert.rejects((say((agent = open("wrote")), "tea"), agent.runAgent()), /404.*wrote/);
agent = open("nap");
say(agent, "tea");
const status = async () => (await (await fetch(`${url}/runs?agent_name=nap`)).json()).runs[0]?.status;
const running = agent.runAgent().catch(() => {});
while ((await status()) !== "running");
agent.abortRun();
await running;
while ((await status()) !== "cancelled");
agent = open("nap");
say(agent, "tea");
let outcome;
const stopping = agent.runAgent({}, { onRunFinishedEvent: ({ event }) => void (outcome = event.outcome) });
while ((await status()) !== "running");
const [{ run_id: napping }] = (await (await fetch(`${url}/runs?agent_name=nap`)).json()).runs;
await fetch(`${url}/run/${napping}/cancel`, { method: "POST" });
await stopping;
assert.deepEqual(outcome, { type: "cancelled" });
await Promise.all(writing);
console.log("all of it");
