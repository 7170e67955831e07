import { WordForm } from "backpack-serving-client/backpack_proto/v1/edits";
import { useEffect, useState } from "preact/hooks";
import { address, note, on } from "../../address";
import { draft } from "../../draft/draft";
import { Field } from "../../parts/Field";
import { Form } from "../../parts/Form";
import { Input } from "../../parts/Input";
import { Outcome } from "../../parts/Outcome";
import { Recipe } from "../../parts/Recipe";
import { Where } from "../../parts/Where";
import { under } from "../../session/request";
import { session, since } from "../../session/session";
import { useCall } from "../../session/useCall";
import { SenseTable } from "./SenseTable";
import { sensesRecipe } from "./recipes";

const LISTED = 8;
const NEIGHBOURS = 5;

export function WordSenses() {
  const { fields } = address.value;
  const [word = "", token, form = "inner"] = ["word", "token", "form"].map((name) => fields.get(name) ?? undefined);
  const [typed, setTyped] = useState(word.trim());
  useEffect(() => setTyped(word.trim()), [word]);
  const named = token
    ? { token: Number(token) }
    : { text: word, form: form === "initial" ? WordForm.INITIAL : WordForm.INNER };
  const call = useCall(
    word
      ? (signal) =>
          session.value!.backpack.inference.listSenses(
            { word: named, limit: LISTED, neighbours: NEIGHBOURS, ...under() },
            { signal },
          )
      : null,
    [word, token, form, on.value, draft.value.join("\n"), since.value],
  );
  return (
    <div class="desk">
      <Form
        label="Senses of a word"
        class="asking"
        onSubmit={() => note({ word: typed.trim(), token: undefined, sense: undefined, form })}
      >
        <Field label="Word" hint="One that is a single token of the model.">
          <Input value={typed} onValue={setTyped} required />
        </Field>
        <Field
          label="Where it stands"
          hint="A word within a text and one at its start are two tokens, with other senses."
        >
          <select value={form} onChange={(event) => note({ form: event.currentTarget.value, token: undefined })}>
            <option value="inner">within a text</option>
            <option value="initial">at the start of a text</option>
          </select>
        </Field>
        <Where />
        <div class="buttons">
          <button class="primary">Show its senses</button>
        </div>
        <Recipe {...sensesRecipe(word.trim() || typed)} />
      </Form>
      <section class="answer" aria-label="Senses">
        <Outcome call={call} of="the senses" idle="Name a word to see what each of its senses speaks for.">
          {(found) => <SenseTable found={found} chosen={fields.get("sense")} />}
        </Outcome>
      </section>
    </div>
  );
}
