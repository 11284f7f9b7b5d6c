// What each column of a table becomes.

/** What a column may become beside an input: left out, or kept with the results. */
export const [LEFT_OUT, KEPT] = ["", "*"];

const bare = (name) => name.toLowerCase().replace(/[\s_-]/g, "");

export class Mapping {
  /** `before` is what columns of these names became before; `outputs` are names that no column can keep. */
  constructor(columns, schema, outputs, before = {}) {
    this.columns = columns;
    this.inputs = Object.keys(schema.properties ?? {});
    this.required = columns.length ? (schema.required ?? []) : [];
    this.outputs = outputs;
    this.chosen = Object.fromEntries(columns.map((name) => [name, this.first(name, before[name])]));
  }

  first(name, before) {
    if (this.choices(name).includes(before)) return before;
    if (this.inputs.includes(name)) return name;
    const like = this.inputs.find((input) => bare(input) === bare(name));
    return like ?? (this.mayBeKept(name) ? KEPT : LEFT_OUT);
  }

  choices(name) {
    return [...(this.mayBeKept(name) ? [KEPT] : []), LEFT_OUT, ...this.inputs];
  }

  /** The server takes a column that is called as an input for that input, and refuses names that a result has. */
  mayBeKept(name) {
    return (
      name !== "" &&
      !this.inputs.some((input) => input.toLowerCase() === name.toLowerCase()) &&
      ![...this.outputs, "error", "error_type"].includes(name)
    );
  }

  /** Names of inputs that no column becomes. */
  open() {
    const taken = new Set(Object.values(this.chosen));
    return this.inputs.filter((input) => !taken.has(input));
  }

  /** Names of inputs that every row needs and no column becomes. */
  missing() {
    return this.open().filter((input) => this.required.includes(input));
  }

  /** Names of columns that become no input. */
  free() {
    return this.columns.filter((name) => name && !this.inputs.includes(this.chosen[name]));
  }

  /** As `input_mapping` of the API: a column that is left out is null, and one that keeps its name is not there. */
  asOption() {
    return Object.fromEntries(
      Object.entries(this.chosen)
        .filter(([name, choice]) => choice !== KEPT && choice !== name)
        .map(([name, choice]) => [name, choice === LEFT_OUT ? null : choice]),
    );
  }

  /** What a row has of each column. */
  cells({ inputs, extra }) {
    return this.columns.map((name) => (this.chosen[name] === KEPT ? extra?.[name] : inputs[this.chosen[name]]));
  }
}
