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
import { usesRecipe } from "./recipes";
import { UseList } from "./UseList";

const LISTED = 12;

/** Where a word stands in held-out text, and what each of its senses said there. */
export function WordUses() {
  const { fields } = address.value;
  const [word = "", token, form = "inner"] = ["word", "token", "form"].map((name) => fields.get(name) ?? undefined);
  const [typed, setTyped] = useState(word.trim());
  useEffect(() => setTyped(word.trim()), [word]);
  const named = token
    ? { token: Number(token) }
    : { text: word, form: form === "initial" ? WordForm.INITIAL : WordForm.INNER };
  const call = useCall(
    word
      ? (signal) => session.value!.backpack.inference.listUses({ word: named, limit: LISTED, ...under() }, { signal })
      : null,
    [word, token, form, on.value, draft.value.join("\n"), since.value],
  );
  return (
    <div class="desk">
      <Form label="Uses of a word" class="asking" onSubmit={() => note({ word: typed.trim(), token: undefined, form })}>
        <Field label="Word" hint="One that is a single token of the model.">
          <Input value={typed} onValue={setTyped} required />
        </Field>
        <Field label="Where it stands">
          <select value={form} onChange={(event) => note({ form: event.currentTarget.value, token: undefined })}>
            <option value="inner">within a text</option>
            <option value="initial">at the start of a text</option>
          </select>
        </Field>
        <Where />
        <div class="buttons">
          <button class="primary">Show its uses</button>
        </div>
        <p class="hint">
          In the text that lies beside the model, which it wasn't trained on. Shown to keys with the role author.
        </p>
        <Recipe {...usesRecipe(word.trim() || typed)} />
      </Form>
      <section class="answer" aria-label="Uses">
        <Outcome call={call} of="the uses" idle="Name a word to see where it is used, and which of its senses speak.">
          {(found) => <UseList found={found} />}
        </Outcome>
      </section>
    </div>
  );
}
