// The questions of a waiting run, as forms.

import { actions, button, fill, h, quiet, wide } from "./dom.js";
import { form, plain, sending } from "./form.js";
import { busyWhile } from "./notices.js";
import { readable } from "./value.js";
import { when } from "./words.js";

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
  const onsubmit = (event) => {
    event.preventDefault();
    submit({ currentTarget: event.submitter });
  };
  return h("form.panel", { onsubmit }, head, fields.node, wrong, actions(h("button.primary", "Answer")));
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
  const approve = button("", (event) => (isEditing ? approveEdited : approveAsAsked)(event), { class: "primary" });
  const edit = button("", () => {
    isEditing = !isEditing;
    draw();
    if (isEditing) fields.node.querySelector("input, select, textarea")?.focus();
  });
  const deny = button(
    "Deny",
    busyWhile(() => answer({ approved: false, ...reason.read() })),
  );
  draw();
  return [call, reason.node, actions(approve, deny, properties.arguments && edit)];
}
