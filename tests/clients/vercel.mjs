import assert from "node:assert";
import { Chat } from "@ai-sdk/react";
import {
  DefaultChatTransport,
  lastAssistantMessageIsCompleteWithApprovalResponses,
  lastAssistantMessageIsCompleteWithToolCalls,
} from "ai";

const [url, isKilled] = process.argv.slice(2);
const look = { name: "look", description: "Looks.", parameters: { type: "object", properties: { at: { type: "string" } } } };
const open = (agent, more = {}, body = {}) =>
  new Chat({ transport: new DefaultChatTransport({ api: `${url}/vercel/${agent}`, body }), ...more });
const text = (chat) => chat.lastMessage.parts.map((part) => (part.type === "text" ? part.text : "")).join("");
const until = async (isTrue) => {
  while (!isTrue()) await new Promise((resolve) => setTimeout(resolve, 5));
};

if (isKilled) {
  const chat = open("hold");
  const renders = [];
  const update = () => chat.lastMessage?.role === "assistant" && renders.push(text(chat));
  chat["~registerMessagesCallback"](update);
  const sending = chat.sendMessage({ text: "tea" });
  await until(() => chat.lastMessage?.role === "assistant" && text(chat) === "All ");
  console.log("half");
  await sending;
  while (chat.status === "error" || text(chat) !== "All about tea") {
    await chat.resumeStream();
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  assert.deepEqual(chat.messages.map((message) => message.role), ["user", "assistant"]);
  // Whatever was shown at any time is the beginning of the whole: each character was shown once.
  assert.deepEqual(renders.filter((shown) => !"All about tea".startsWith(shown)), []);
  assert.deepEqual([renders.includes("All "), renders.at(-1)], [true, "All about tea"]);
  console.log("all of it");
  process.exit(0);
}

// Text, a second turn, and another answer in place of the last one
let chat = open("roles");
await chat.sendMessage({ text: "tea" });
assert.equal(text(chat), "user=tea");
await chat.sendMessage({ text: "more" });
assert.equal(text(chat), "user=tea assistant=user=tea user=more");
const replaced = chat.lastMessage.id;
await chat.regenerate();
assert.equal(text(chat), "user=tea assistant=user=tea user=more");
assert.notEqual(chat.lastMessage.id, replaced);
assert.equal(chat.messages.length, 4);
const listed = await (await fetch(`${url}/vercel/roles/${chat.id}`)).json();
assert.deepEqual(listed.map((message) => message.parts[0].text), ["tea", "user=tea", "more", text(chat)]);

// Reasoning, and a result that is no text
chat = open("thinker");
await chat.sendMessage({ text: "sky" });
assert.deepEqual(chat.lastMessage.parts.map((part) => part.type), ["step-start", "reasoning", "step-start", "text"]);
chat = open("mood");
await chat.sendMessage({ text: "a b" });
assert.deepEqual(chat.lastMessage.parts.find((part) => part.type === "data-result").data.words, ["a", "b"]);

// A text that is taken back
chat = open("replaced");
const replacing = chat.sendMessage({ text: "tea" });
await until(() => chat.lastMessage?.role === "assistant" && text(chat) === "The first");
await replacing;
assert.equal(text(chat), "Another one");
assert.equal(chat.lastMessage.parts.find((part) => part.type === "tool-write").output.result, "All about tea");

// An approval
chat = open("payer", { sendAutomaticallyWhen: lastAssistantMessageIsCompleteWithApprovalResponses });
await chat.sendMessage({ text: "pay" });
let part = chat.lastMessage.parts.find((part) => part.type === "tool-pay");
assert.equal(part.state, "approval-requested");
await chat.addToolApprovalResponse({ id: part.approval.id, approved: true });
await until(() => chat.status === "ready" && text(chat) !== "");
assert.equal(text(chat), "paid 3");
part = chat.lastMessage.parts.find((part) => part.type === "tool-pay");
assert.deepEqual([part.state, part.output], ["output-available", "paid 3"]);

// Tools of the client
let executed = 0;
chat = open("guide", {
  sendAutomaticallyWhen: lastAssistantMessageIsCompleteWithToolCalls,
  onToolCall: ({ toolCall }) => {
    executed += 1;
    chat.addToolOutput({ tool: toolCall.toolName, toolCallId: toolCall.toolCallId, output: `${toolCall.input.at} is blue` });
  },
}, { tools: [look] });
await chat.sendMessage({ text: "look" });
await until(() => chat.status === "ready" && text(chat) !== "");
assert.deepEqual([text(chat), executed], ["sea is blue", 2]);
await chat.resumeStream();
assert.deepEqual([text(chat), executed, chat.messages.length], ["sea is blue", 2, 2]);

// A reload in the middle of an answer, and a stop
chat = open("slow");
const sending = chat.sendMessage({ text: "tea" });
await until(() => chat.lastMessage?.role === "assistant" && text(chat) !== "");
await chat.stop();
await sending;
const history = await (await fetch(`${url}/vercel/slow/${chat.id}`)).json();
const reloaded = open("slow", { id: chat.id, messages: history });
await reloaded.resumeStream();
assert.deepEqual(reloaded.messages.map((message) => message.role), ["user", "assistant"]);
assert.equal(text(reloaded), "All about tea");
chat = open("nap");
chat.sendMessage({ text: "tea" });
await until(() => chat.status !== "ready");
while ((await (await fetch(`${url}/runs?agent_name=nap`)).json()).runs[0]?.status !== "running");
assert.equal((await fetch(`${url}/vercel/nap/${chat.id}/stop`, { method: "POST" })).status, 204);
await until(() => chat.status === "ready");

// Errors
chat = open("fail");
await chat.sendMessage({ text: "tea" });
assert.match(chat.error.message, /^no The run is /);
chat = open("wrote");
await chat.sendMessage({ text: "tea" });
assert.match(JSON.parse(chat.error.message).error, /wrote/);
console.log("all of it");
