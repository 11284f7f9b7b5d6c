// The mapping of columns to inputs.

/** A column that is not mapped to an input is dropped, or kept in the results. */
export const [DROPPED, KEPT] = ["", "*"];

const normalized = (name) => name.toLowerCase().replace(/[\s_-]/g, "");

export class Mapping {
  /** `previous` is the last mapping of these column names. `outputs` are names that a kept column cannot have. */
  constructor(columns, schema, outputs, previous = {}) {
    this.columns = columns;
    this.inputs = Object.keys(schema.properties ?? {});
    this.required = columns.length ? (schema.required ?? []) : [];
    this.outputs = outputs;
    this.chosen = Object.fromEntries(columns.map((name) => [name, this.initialChoice(name, previous[name])]));
  }

  initialChoice(name, previous) {
    if (this.choices(name).includes(previous)) return previous;
    if (this.inputs.includes(name)) return name;
    const similar = this.inputs.find((input) => normalized(input) === normalized(name));
    return similar ?? (this.canKeep(name) ? KEPT : DROPPED);
  }

  choices(name) {
    return [...(this.canKeep(name) ? [KEPT] : []), DROPPED, ...this.inputs];
  }

  /** The server maps a column with the name of an input to that input, and rejects the names of outputs. */
  canKeep(name) {
    return (
      name !== "" &&
      !this.inputs.some((input) => input.toLowerCase() === name.toLowerCase()) &&
      ![...this.outputs, "error", "error_type"].includes(name)
    );
  }

  unmapped() {
    const taken = new Set(Object.values(this.chosen));
    return this.inputs.filter((input) => !taken.has(input));
  }

  missing() {
    return this.unmapped().filter((input) => this.required.includes(input));
  }

  unused() {
    return this.columns.filter((name) => name && !this.inputs.includes(this.chosen[name]));
  }

  /** Return `input_mapping` of the API. A dropped column is null, and one with the same name as its input is omitted. */
  asOption() {
    return Object.fromEntries(
      Object.entries(this.chosen)
        .filter(([name, choice]) => choice !== KEPT && choice !== name)
        .map(([name, choice]) => [name, choice === DROPPED ? null : choice]),
    );
  }

  cells({ inputs, extra }) {
    return this.columns.map((name) => (this.chosen[name] === KEPT ? extra?.[name] : inputs[this.chosen[name]]));
  }
}
