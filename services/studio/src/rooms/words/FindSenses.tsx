import { useEffect, useState } from "preact/hooks";
import { address, note } from "../../address";
import { Field } from "../../parts/Field";
import { Form } from "../../parts/Form";
import { Input } from "../../parts/Input";
import { More } from "../../parts/More";
import { Outcome } from "../../parts/Outcome";
import { Recipe } from "../../parts/Recipe";
import { Text } from "../../parts/Text";
import { Where } from "../../parts/Where";
import { useAction } from "../../session/useCall";
import { FoundTable } from "./FoundTable";
import { findRecipe } from "./recipes";
import { find, prompts, type Found, type Search } from "./search";

export function FindSenses() {
  const { fields } = address.value;
  const [search, setSearch] = useState<Search>(() => ({
    words: fields.get("find") ?? "",
    against: fields.get("against") ?? "",
    effect: fields.get("effect") ?? "raise",
    order: fields.get("order") ?? "score",
    prompts: fields.getAll("prompt").join("\n"),
  }));
  const first = useAction((signal) => find(signal, search));
  const more = useAction((signal, before: Found) => find(signal, search, before));
  const set = (name: keyof Search) => (value: string) => setSearch({ ...search, [name]: value });

  function begin(): void {
    const { words, against, effect, order } = search;
    note({ find: words, against, effect, order, prompt: prompts(search) });
    more.stop();
    void first.start();
  }
  useEffect(() => {
    if (search.words) begin();
  }, []);
  const found = more.call.state === "done" && first.call.state === "done" ? more.call : first.call;

  return (
    <div class="desk">
      <Form label="Find senses" class="asking" onSubmit={begin}>
        <Field label="Words" hint="Such as “ship sail”: the mean over them counts.">
          <Input value={search.words} onValue={set("words")} required />
        </Field>
        <Field label="Set against" hint="Left empty: against all words.">
          <Input value={search.against} onValue={set("against")} />
        </Field>
        <div class="pair">
          <Field label="Senses that">
            <select value={search.effect} onChange={(event) => set("effect")(event.currentTarget.value)}>
              <option value="raise">raise them</option>
              <option value="lower">lower them</option>
              <option value="both">do either</option>
            </select>
          </Field>
          <Field label="Ranked by">
            <select value={search.order} onChange={(event) => set("order")(event.currentTarget.value)}>
              <option value="score">score</option>
              <option value="use">score × how often used</option>
            </select>
          </Field>
        </div>
        <Field
          label="In these prompts"
          hint="One on each line. With some, senses are ranked by what they add at their ends. Left empty: by themselves."
        >
          <Text rows={3} value={search.prompts} onValue={set("prompts")} />
        </Field>
        <Where />
        <div class="buttons">
          <button class="primary">Find</button>
        </div>
        <Recipe {...findRecipe(search)} />
      </Form>
      <section class="answer" aria-label="Answer">
        <Outcome
          call={found}
          of="the senses of all words"
          idle="Name words to see which senses, of all words, speak for them."
        >
          {(value) => <FoundTable found={value} />}
        </Outcome>
        <More shown={found} more={more} />
      </section>
    </div>
  );
}
