// A chat with an agent in the terminal: node chat.js AGENT. Ctrl-C cancels the answer.

import { stdin, stdout } from "node:process";
import { createInterface } from "node:readline";
import createClient from "openapi-fetch";
import { Text, events, submit } from "./flock-stream.js";
import type { components, paths } from "./schema.js";

const { FLOCK_URL: url = "http://127.0.0.1:8344", FLOCK_API_KEY: apiKey } = process.env;
const [agent_name = "chat"] = process.argv.slice(2);
const client = createClient<paths, "application/json" | "application/problem+json">({
  baseUrl: url,
  headers: apiKey ? { Authorization: `Bearer ${apiKey}` } : {},
});
const { data: agent, error } = await client.GET("/agents/{name}", { params: { path: { name: agent_name } } });
if (error) throw new Error(error.detail);
const firstOf = (schema: { [name: string]: unknown }) => Object.keys(schema["properties"] ?? {})[0] ?? "";
const lines = createInterface({ input: stdin })[Symbol.asyncIterator]();
const ask = async (prompt: string): Promise<string | undefined> => (stdout.write(prompt), (await lines.next()).value);

const asked = new Set<string>();

/** Answer an open question of a run, unless somebody else has answered it. */
async function answer(run_id: string, asking: components["schemas"]["Question"]) {
  const { call_id, question, schema, arguments: given } = asking;
  asked.add(call_id);
  const isApproval = "approved" in ((schema["properties"] ?? {}) as object);
  const said = await ask(`\n${question} ${JSON.stringify(given ?? {})} ${isApproval ? "[y/n]" : "(JSON)"} `);
  const output = isApproval ? { approved: said === "y" } : JSON.parse(said ?? "null");
  const { error } = await client.POST("/run/{run_id}/calls/{call_id}", {
    params: { path: { run_id, call_id } },
    body: { output },
  });
  if (error) console.error(error.detail);
}

const session_id = crypto.randomUUID();
for (let message; (message = await ask("> ")); ) {
  const inputs = { [firstOf(agent.input_schema)]: message };
  const run = await submit({ url, apiKey }, { agent_name, inputs, session_id }, crypto.randomUUID());
  const cancel = () => void client.POST("/run/{run_id}/cancel", { params: { path: { run_id: run.run_id } } });
  process.once("SIGINT", cancel);
  const text = new Text(firstOf(agent.output_schema));
  for await (const event of events({ url, apiKey }, run.run_id)) {
    const { added, isReset } = text.add(event);
    stdout.write(isReset ? `\n${added}` : added);
    for (const question of event.event === "run.waiting" ? event.data.waiting_for : [])
      if (!asked.has(question.call_id)) await answer(run.run_id, question);
    if (event.event === "run.failed" || event.event === "run.cancelled") stdout.write(`(${event.data.error})`);
  }
  stdout.write("\n");
  process.off("SIGINT", cancel);
}
process.exit();
