import { createElement as element } from "react";
import { createRoot } from "react-dom/client";
import { useChat } from "@ai-sdk/react";
import { DefaultChatTransport } from "ai";

const api = "/vercel/hold";
const id = "chat-1";
const transport = new DefaultChatTransport({ api });
window.seen = [];

function Chat({ history }) {
  const { messages, sendMessage, status } = useChat({ id, messages: history, resume: true, transport });
  const text = ({ parts }) => parts.map((part) => (part.type === "text" ? part.text : "")).join("");
  window.seen.push(messages.filter(({ role }) => role === "assistant").map(text).join("|"));
  return element(
    "main",
    null,
    element("button", { onClick: () => sendMessage({ text: "tea" }) }, "Ask"),
    ...messages.map((message) => element("p", { key: message.id, className: message.role }, text(message))),
    element("output", null, status),
  );
}

const history = await (await fetch(`${api}/${id}`)).json();
createRoot(document.body).render(element(Chat, { history }));
