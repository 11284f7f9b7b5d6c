import assert from "node:assert";
import { writeFileSync } from "node:fs";
import { z } from "zod";
import { agent as agentOf, agents, server } from "./runtime.mjs";

globalThis.window = globalThis; // CopilotKit's client does nothing without one
const { CopilotKitCore } = await import("@copilotkit/core");
for (const name of ["hold", "roles", "payer", "nap"]) agents[name] = agentOf(name);
if (!server.listening) await new Promise((done) => server.once("listening", done));

// What the provider of CopilotKit's components does in a page
const core = new CopilotKitCore({ runtimeUrl: `http://127.0.0.1:${server.address().port}/api/copilotkit` });
const isConnected = (done) => ({ status }) => status === "connected" && done();
await new Promise((done) => core.subscribe({ onRuntimeConnectionStatusChanged: isConnected(done) }));
const failures = [];
core.subscribe({ onError: ({ error }) => void failures.push(error) });
const open = (name) => Object.assign(core.getAgent(name).clone(), { threadId: crypto.randomUUID() });
const say = (agent, content) => agent.addMessage({ id: crypto.randomUUID(), role: "user", content });
const text = (agent) => agent.messages.filter((message) => message.role === "assistant").at(-1).content;

// A streamed answer: its first piece comes while the agent writes
let agent = open("hold");
say(agent, "tea");
const pieces = [];
agent.subscribe({
  onTextMessageContentEvent: ({ event }) => {
    pieces.push(event.delta);
    writeFileSync(process.argv[2], "");
  },
});
await core.runAgent({ agent });
assert.deepEqual([pieces.length > 1, pieces.join("")], [true, "All about tea"]);

// A second turn
agent = open("roles");
say(agent, "tea");
await core.runAgent({ agent });
say(agent, "more");
await core.runAgent({ agent });
assert.equal(text(agent), "user=tea assistant=user=tea user=more");

// "Regenerate" of CopilotKit's chat removes the answer and runs again, as often as the user likes
const regenerate = async () => {
  agent.setMessages(agent.messages.slice(0, -1));
  await core.runAgent({ agent });
};
await regenerate();
await regenerate();
assert.equal(text(agent), "user=tea assistant=user=tea user=more");
assert.equal(agent.messages.length, 4);
const { runs } = await (await fetch(`${process.argv[3]}/runs?session_id=${agent.threadId}`)).json();
assert.equal(runs.length, 2);

// An approval
agent = open("payer");
say(agent, "pay");
await core.runAgent({ agent });
const [{ id, reason }] = agent.pendingInterrupts;
assert.equal(reason, "approval");
await core.runAgent({ agent, resume: [{ interruptId: id, status: "resolved", payload: { approved: true } }] });
assert.equal(text(agent), "paid 3");

// A tool of the page, which the agent calls twice
const looked = [];
const handler = async ({ at }) => (looked.push(at), `${at} is blue`);
const parameters = z.object({ at: z.string() });
core.addTool({ name: "look", description: "Looks.", parameters, handler, agentId: "guide" });
agent = open("guide");
say(agent, "look");
await core.runAgent({ agent });
assert.deepEqual(looked, ["sky", "sea"]);
assert.equal(text(agent), "sea is blue");

// A stop cancels the run
agent = open("nap");
say(agent, "tea");
const status = async () => (await (await fetch(`${process.argv[3]}/runs?agent_name=nap`)).json()).runs[0]?.status;
const running = core.runAgent({ agent });
const until = async (wanted) => {
  while ((await status()) !== wanted) await new Promise((resolve) => setTimeout(resolve, 20));
};
await until("running");
core.stopAgent({ agent });
await running;
await until("cancelled");
assert.deepEqual(failures, []);
console.log("all of it");
process.exit();
