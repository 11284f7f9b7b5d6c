import assert from "node:assert";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, streamText, tool } from "ai";

const flock = createOpenAICompatible({ name: "flock", baseURL: process.argv[2] + "/v1" });
const { text, usage } = await generateText({ model: flock("write"), prompt: "tea" });
assert.equal(text, "All about tea");
assert.equal(usage.totalTokens, 0);
const pieces = [];
for await (const piece of streamText({ model: flock("slow"), prompt: "tea" }).textStream) pieces.push(piece);
assert.ok(pieces.length > 1, pieces);
assert.equal(pieces.join(""), "All about tea");
const look = tool({
  description: "Look at something.",
  inputSchema: jsonSchema({ type: "object", properties: { at: { type: "string" } }, required: ["at"] }),
  execute: async ({ at }) => `${at} is blue`,
});
const called = await generateText({ model: flock("guide"), prompt: "Look.", tools: { look }, stopWhen: ({ steps }) => steps.length > 1 });
assert.equal(called.steps[0].toolCalls.length, 2);
assert.equal(called.text, "sea is blue");
await assert.rejects(generateText({ model: flock("wrote"), prompt: "tea", maxRetries: 0 }), /wrote/);
console.log("all of it");
