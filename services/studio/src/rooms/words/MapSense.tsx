import { useEffect, useState } from "preact/hooks";
import { address, note } from "../../address";
import { Field } from "../../parts/Field";
import { Form } from "../../parts/Form";
import { Input } from "../../parts/Input";
import { Outcome } from "../../parts/Outcome";
import { Recipe } from "../../parts/Recipe";
import { Text } from "../../parts/Text";
import { Where } from "../../parts/Where";
import { session } from "../../session/session";
import { useAction } from "../../session/useCall";
import { map, type Mapping } from "./mapping";
import { MapTable } from "./MapTable";
import { mapRecipe } from "./recipes";

export function MapSense() {
  const { fields } = address.value;
  const [mapping, setMapping] = useState<Mapping>(() => ({
    sense: fields.get("sense") ?? "0",
    words: fields.get("words") ?? "",
    toward: fields.get("toward") ?? "",
    against: fields.get("against") ?? "",
  }));
  const drawn = useAction(async (signal, asked: Mapping) => ({ asked, found: await map(signal, asked) }));
  const set = (name: keyof Mapping) => (value: string) => setMapping({ ...mapping, [name]: value });
  function begin(): void {
    note({ ...mapping });
    void drawn.start(mapping);
  }
  useEffect(() => {
    if (mapping.words) begin();
  }, []);
  const last = (session.value!.model?.numSenses ?? 1) - 1;
  return (
    <div class="desk">
      <Form label="Map a sense" class="asking" onSubmit={begin}>
        <Field label="Sense" hint={`0 to ${last}: the same one of each word.`}>
          <Input type="number" value={mapping.sense} onValue={set("sense")} required min="0" max={String(last)} />
        </Field>
        <Field
          label="Words"
          hint="3 to 256, with spaces between. Such as the words of a topic, or a word's neighbours."
        >
          <Text rows={4} value={mapping.words} onValue={set("words")} required />
        </Field>
        <Field
          label="To the right: words that it speaks for"
          hint="Left empty: the two directions in which the words differ most."
        >
          <Input value={mapping.toward} onValue={set("toward")} />
        </Field>
        <Field label="Set against" hint="Left empty: against all words.">
          <Input value={mapping.against} onValue={set("against")} />
        </Field>
        <Where />
        <div class="buttons">
          <button class="primary">Draw the map</button>
        </div>
        <Recipe {...mapRecipe(mapping)} />
      </Form>
      <section class="answer" aria-label="Map">
        <Outcome
          call={drawn.call}
          of="the map"
          idle="Name a sense and some words to see where it lies for each: alike, apart, or for what."
        >
          {({ asked, found }) => <MapTable found={found} sense={asked.sense} toward={toward(asked)} />}
        </Outcome>
      </section>
    </div>
  );
}

function toward({ toward: words, against }: Mapping): string {
  return (
    words.trim() &&
    `the logits of “${words.trim()}”, less those of ${against.trim() ? `“${against.trim()}”` : "all words"}`
  );
}
