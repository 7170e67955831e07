import { useState } from "preact/hooks";
import { address, note } from "../../address";
import { draft } from "../../draft/draft";
import { commandEdits, commandWhere, pythonWhere, withClient } from "../../parts/asking";
import { Field } from "../../parts/Field";
import { Form } from "../../parts/Form";
import { Input } from "../../parts/Input";
import { Outcome } from "../../parts/Outcome";
import { Recipe } from "../../parts/Recipe";
import { Text } from "../../parts/Text";
import { literal, quoted } from "../../parts/words";
import { under } from "../../session/request";
import { session } from "../../session/session";
import { useAction } from "../../session/useCall";
import { JudgementView } from "../../parts/JudgementView";
import { listed } from "../words/search";
import { readSampling } from "../write/sampling";
import { TrialView } from "./TrialView";
import { tryDraft } from "./trial";

const MOST = 6;
const MOVED = 8;

export function TryDraft() {
  const { fields } = address.value;
  const [prompts, setPrompts] = useState(fields.getAll("prompt").join("\n") || "How to take care of a horse:");
  const [words, setWords] = useState(fields.get("targets") ?? "");
  const [sampling, setSampling] = useState({
    max_tokens: fields.get("max_tokens") ?? "24",
    temperature: fields.get("temperature") ?? "",
    seed: fields.get("seed") ?? "0",
  });
  const lines = prompts.split("\n").filter((line) => line.trim());
  const trial = useAction((signal) => tryDraft(signal, lines.slice(0, MOST), listed(words), readSampling(sampling)));
  const judged = useAction((signal) =>
    session.value!.backpack.inference.judge({ limit: MOVED, ...under() }, { signal }),
  );
  const set = (name: keyof typeof sampling) => (value: string) => setSampling({ ...sampling, [name]: value });

  function begin(): void {
    note({ prompt: lines, targets: words, ...sampling });
    void trial.start();
    void judged.start();
  }

  return (
    <section class="panel" aria-labelledby="try">
      <h2 id="try">Try it</h2>
      <Form label="Try the draft" onSubmit={begin}>
        <Field label="Prompts" hint={`One on each line, at most ${MOST}.`}>
          <Text rows={3} value={prompts} onValue={setPrompts} required />
        </Field>
        <div class="grid wide">
          <Field label="Words to watch">
            <Input value={words} onValue={setWords} />
          </Field>
          <Field label="Most tokens">
            <Input type="number" min="1" value={sampling.max_tokens} onValue={set("max_tokens")} />
          </Field>
          <Field label="Temperature">
            <Input type="number" min="0" step="any" value={sampling.temperature} onValue={set("temperature")} />
          </Field>
          <Field label="Seed">
            <Input type="number" min="0" value={sampling.seed} onValue={set("seed")} />
          </Field>
        </div>
        <div class="buttons">
          <button class="primary" disabled={draft.value.length === 0}>
            Try
          </button>
          {draft.value.length === 0 && <span class="quiet">There is no edit to try yet.</span>}
        </div>
      </Form>
      <Outcome call={trial.call} of="the texts">
        {(found) => found.map((one) => <TrialView key={one.prompt} trial={one} />)}
      </Outcome>
      {judged.call.state !== "idle" && (
        <>
          <h3>What it does to ordinary text</h3>
          <Outcome call={judged.call} of="its judgement">
            {(judgement) => <JudgementView judgement={judgement} />}
          </Outcome>
        </>
      )}
      {draft.value.length > 0 && <Recipe {...recipe(lines[0] ?? "", words)} />}
    </section>
  );
}

function recipe(prompt: string, words: string) {
  const targets = listed(words).map((word) => ` --target ${quoted(word)}`);
  return {
    shell: [`backpack try ${quoted(prompt)}${commandEdits()}${targets.join("")}${commandWhere()}`],
    python: withClient(
      "Client",
      `print(client.generate(${literal(prompt)}${pythonWhere()}).text)`,
      `print(client.judge(${pythonWhere().slice(2)}))`,
    ),
  };
}
