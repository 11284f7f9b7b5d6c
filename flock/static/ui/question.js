// The questions of a waiting run, as forms.

import { post } from "./api.js";
import { actions, button, fill, h, quiet, submitting, wide } from "./dom.js";
import { form, plain, sending } from "./form.js";
import { busyWhile } from "./notices.js";
import { readable } from "./value.js";
import { when } from "./words.js";

/** The open questions of the run at `path`. `answered(run)` gets the run after an answer. */
export function questions(path, answered, signal) {
  const node = h("div"),
    shown = new Map();
  /** Add new questions and remove answered ones. The others stay, since somebody may be typing an answer. */
  const draw = ({ waiting_for: open = [] }) => {
    for (const [call_id, form] of shown)
      if (!open.some((each) => each.call_id === call_id)) {
        form.remove();
        shown.delete(call_id);
      }
    for (const each of open)
      if (!shown.has(each.call_id)) {
        const address = `${path}/calls/${encodeURIComponent(each.call_id)}`;
        const form = question(each, async (output) => answered(await post(address, { output }, { signal })));
        shown.set(each.call_id, form);
        node.append(form);
      }
  };
  return { node, draw };
}

/** `answer(output)` sends the answer. */
export function question({ question, schema, arguments: about, expires_at, kind }, answer) {
  const { properties = {} } = plain(schema, schema);
  const names = Object.keys(properties).sort().join();
  const isApproval = names === "approved,arguments,reason" || (about && names === "approved,reason");
  const head = [h("h2", kind ? `Output of the client's tool ${question}` : question), expires_at && quiet("Expires ", when(expires_at))];
  return isApproval
    ? h("section.panel", { "aria-label": question }, head, approvalForm(properties, schema.$defs, about, answer))
    : answerForm([head, about && wide("Arguments", readable(about))], schema, answer);
}

function answerForm(head, schema, answer) {
  const fields = form({ properties: { answer: schema }, required: ["answer"], $defs: schema.$defs });
  const error = (pointer, text) => fields.error(pointer.replace("/output", "/answer"), text);
  const { wrong, send } = sending({ ...fields, error }, "");
  const submit = send((output) => answer(output.answer));
  return h("form.panel", { onsubmit: submitting(submit) }, head, fields.node, wrong, actions(h("button.primary", "Answer")));
}

/** Whether a tool may be called: approve it, deny it with a reason, or change its arguments first, if that is allowed. */
function approvalForm(properties, $defs, about, answer) {
  const changed = { ...plain(properties.arguments ?? {}, { $defs }), isNullable: false, default: undefined };
  const fields = form({ properties: { arguments: changed }, required: ["arguments"], $defs }, { arguments: about });
  const reason = form({ properties: { reason: properties.reason } });
  const { wrong, send } = sending(fields, "/output");
  const approveAsAsked = busyWhile(() => answer({ approved: true }));
  const approveEdited = send((output) => answer({ approved: true, ...output }));
  const call = h("div.field");
  let isEditing = false;
  const draw = () => {
    fill(call, isEditing ? [fields.node, wrong] : wide("Arguments", readable(about)));
    fill(approve, isEditing ? "Approve the edited call" : "Approve");
    fill(edit, isEditing ? "Discard the edits" : "Edit");
  };
  const approve = h("button.primary");
  const edit = button("", () => {
    isEditing = !isEditing;
    draw();
    if (isEditing) fields.node.querySelector("input, select, textarea")?.focus();
  });
  const onsubmit = submitting((event) => (isEditing ? approveEdited : approveAsAsked)(event));
  const deny = submitting(busyWhile(() => answer({ approved: false, ...reason.read() })));
  draw();
  return [
    h("form", { onsubmit }, call, actions(approve, properties.arguments && edit)),
    h("form", { onsubmit: deny }, reason.node, actions(h("button", "Deny"))), // so that its reason never approves
  ];
}
