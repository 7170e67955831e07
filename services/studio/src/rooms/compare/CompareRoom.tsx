import { useEffect, useState } from "preact/hooks";
import { address, note, on } from "../../address";
import { draft } from "../../draft/draft";
import { asTenant, withClient } from "../../parts/asking";
import { Field } from "../../parts/Field";
import { Form } from "../../parts/Form";
import { Heading } from "../../parts/Heading";
import { Input } from "../../parts/Input";
import { Outcome } from "../../parts/Outcome";
import { Recipe } from "../../parts/Recipe";
import { Text } from "../../parts/Text";
import { Where } from "../../parts/Where";
import { literal, quoted } from "../../parts/words";
import { isNumber } from "../../session/request";
import { useAction } from "../../session/useCall";
import { listed } from "../words/search";
import { ChooseReleases } from "./ChooseReleases";
import { compare, DRAFT } from "./comparison";
import { ComparedScores } from "./ComparedScores";
import { ComparedTexts } from "./ComparedTexts";
import { NextTokens } from "./NextTokens";

export function CompareRoom() {
  const { fields } = address.value;
  const [prompt, setPrompt] = useState(fields.get("prompt") ?? "How to take care of a horse:");
  const [words, setWords] = useState(fields.get("targets") ?? "");
  const [tokens, setTokens] = useState(fields.get("max_tokens") ?? "24");
  const named = fields.getAll("with");
  const releases = named.length ? named : [...new Set(["0", on.value]), ...(draft.value.length ? [DRAFT] : [])];
  const { call, start } = useAction((signal) => compare(signal, prompt, releases, listed(words), Number(tokens)));

  function begin(): void {
    note({ prompt, targets: words, max_tokens: tokens, with: releases });
    void start();
  }
  useEffect(() => {
    if (named.length && fields.get("prompt")) begin();
  }, []);

  return (
    <>
      <Heading title="Compare">
        One text under several releases. The Transformer reads it once: no release changes what it computes.
      </Heading>
      <div class="desk">
        <Form label="Compare" class="asking" onSubmit={begin}>
          <Field label="Text">
            <Text rows={4} value={prompt} onValue={setPrompt} required />
          </Field>
          <ChooseReleases chosen={releases} onChosen={(chosen) => note({ with: chosen })} />
          {releases.includes(DRAFT) && <Where />}
          <div class="pair">
            <Field label="Words to watch">
              <Input value={words} onValue={setWords} />
            </Field>
            <Field label="Tokens to write">
              <Input type="number" min="0" value={tokens} onValue={setTokens} />
            </Field>
          </div>
          <div class="buttons">
            <button class="primary">Compare</button>
          </div>
          <Recipe {...recipe(prompt, releases, words)} />
        </Form>
        <section class="answer" aria-label="Comparison">
          <Outcome call={call} of="the releases" idle="Nothing is compared yet.">
            {(found) => (
              <>
                <NextTokens columns={found.columns} />
                <ComparedScores comparison={found} />
                <ComparedTexts comparison={found} />
              </>
            )}
          </Outcome>
        </section>
      </div>
    </>
  );
}

function recipe(prompt: string, releases: string[], words: string) {
  const stored = releases.filter((name) => name !== DRAFT);
  const names = stored.map((name) => ` --release ${name === "0" ? "unpatched" : quoted(name)}`).join("");
  const targets = listed(words).map((word) => ` --target ${quoted(word)}`);
  const python = stored.map((name) => (isNumber(name) ? name : literal(name))).join(", ");
  return {
    shell: [
      `backpack compare ${quoted(prompt)}${names}${targets.join("")}${asTenant()}`,
      `backpack compare ${quoted(prompt)}${names} --score${asTenant()}`,
    ],
    python: withClient(
      "Client",
      `for one in client.compare(${literal(prompt)}, [${python}]):`,
      "    print(one.served.release, *[token.text for token in one.top])",
    ),
  };
}
