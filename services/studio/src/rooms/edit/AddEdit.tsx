import { useState } from "preact/hooks";
import { address } from "../../address";
import { draft, setDraft } from "../../draft/draft";
import { KINDS, parseLine, type Kind } from "../../draft/line";
import { quotedWord } from "../../draft/shellWords";
import { vectorLine } from "../../draft/vectorLine";
import { Field } from "../../parts/Field";
import { Form } from "../../parts/Form";
import { Input } from "../../parts/Input";
import { Text } from "../../parts/Text";
import { session } from "../../session/session";

const EFFECTS: Record<Kind | "add" | "set", string> = {
  ...(Object.fromEntries(Object.entries(KINDS).map(([kind, { effect }]) => [kind, effect])) as Record<Kind, string>),
  add: "v ← v + δ, numbers of yours",
  set: "v ← numbers of yours",
};
type AnyKind = keyof typeof EFFECTS;

/** What each kind needs beside its words: the name of a field and what it is at first. */
const ARGUMENTS: Record<AnyKind, { label: string; first?: string }[]> = {
  scale: [{ label: "Factor", first: "0" }],
  copy: [{ label: "Word to copy, or WORD:SENSE" }],
  swap: [{ label: "Word it speaks for" }, { label: "Word in its place" }],
  "project-out": [{ label: "Word to say nothing of" }],
  topic: [{ label: "Strength, 1 to 3", first: "1" }],
  bias: [{ label: "Added to the logit", first: "-5" }],
  forbid: [],
  add: [{ label: "Vector" }],
  set: [{ label: "Vector" }],
};

const OF_WORDS: AnyKind[] = ["topic", "bias", "forbid"];
/* Kinds that reach words as wholes, not their senses. */

export function AddEdit() {
  const { fields } = address.value;
  const [kind, setKind] = useState<AnyKind>("scale");
  const [words, setWords] = useState(fields.get("words") ?? "");
  const [senses, setSenses] = useState(fields.get("senses") ?? "");
  const [given, setGiven] = useState<string[]>([]);
  const [wrong, setWrong] = useState("");
  const needed = ARGUMENTS[kind];
  const values = needed.map(({ first = "" }, at) => given[at] ?? first);

  function add(): void {
    try {
      const where = OF_WORDS.includes(kind) || !senses.trim() ? words : `${words}:${senses}`;
      const tight = where
        .replaceAll(/\s*,\s*/g, ",")
        .replaceAll(/\s*:\s*/g, ":")
        .trim();
      const line = isVector(kind)
        ? vectorLine(kind, quotedWord(tight), values[0]!, session.value!.model?.width ?? 0)
        : [kind, tight, ...values.map((value) => value.trim())].map(quotedWord).join(" ");
      parseLine(line);
      setDraft([...draft.value, line]);
      setWrong("");
    } catch (error) {
      setWrong((error as Error).message);
    }
  }

  return (
    <Form label="Add an edit" onSubmit={add}>
      <Field label="Kind" hint={EFFECTS[kind]}>
        <select
          value={kind}
          onChange={(event) => {
            setKind(event.currentTarget.value as AnyKind);
            setGiven([]);
          }}
        >
          {Object.keys(EFFECTS).map((name) => (
            <option key={name}>{name}</option>
          ))}
        </select>
      </Field>
      <Field
        label="Words"
        hint="With commas between them. Both tokens of a word are meant, with and without a space before it."
      >
        <Input value={words} onValue={setWords} required />
      </Field>
      {!OF_WORDS.includes(kind) && (
        <Field label="Senses" hint="Such as 3 or 8,12-14. Left empty: all of them.">
          <Input value={senses} onValue={setSenses} />
        </Field>
      )}
      {needed.map(({ label }, at) => {
        const set = (value: string) => setGiven(values.with(at, value));
        return isVector(kind) ? (
          <Field
            key={label}
            label={label}
            hint={`${session.value!.model?.width} numbers, with commas or spaces between.`}
          >
            <Text rows={3} value={values[at]!} onValue={set} required />
          </Field>
        ) : (
          <Field key={label} label={label}>
            <Input value={values[at]!} onValue={set} required />
          </Field>
        );
      })}
      {wrong && (
        <p class="refused" role="alert">
          {wrong}
        </p>
      )}
      <div class="buttons">
        <button class="primary">Add to the draft</button>
      </div>
    </Form>
  );
}

function isVector(kind: AnyKind): kind is "add" | "set" {
  return kind === "add" || kind === "set";
}
