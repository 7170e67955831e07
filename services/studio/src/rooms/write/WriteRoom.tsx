import { FinishReason } from "backpack-serving-client/backpack_proto/v1/inference";
import { useState } from "preact/hooks";
import { address, note } from "../../address";
import { draft } from "../../draft/draft";
import { commandEdits, commandWhere, pythonWhere, withClient } from "../../parts/asking";
import { Field } from "../../parts/Field";
import { Form } from "../../parts/Form";
import { Heading } from "../../parts/Heading";
import { Legend } from "../../parts/Legend";
import { Recipe } from "../../parts/Recipe";
import { Refused } from "../../parts/Refused";
import { ServedBy } from "../../parts/ServedBy";
import { Text } from "../../parts/Text";
import { CHANGE, changeTint, factor, PROBABILITY, probabilityTint } from "../../parts/tint";
import { TokenText } from "../../parts/TokenText";
import { literal, percent, quoted } from "../../parts/words";
import { Where } from "../../parts/Where";
import { useAction } from "../../session/useCall";
import { IN_TRY, keywords, options, readSampling, SAMPLING, type SamplingFields } from "./sampling";
import { SamplingForm } from "./SamplingForm";
import { TokenDetails, useTerms } from "./TokenDetails";
import { isSteered, useChanges } from "./useChanges";
import { write, type Writing } from "./writing";

export function WriteRoom() {
  const { fields } = address.value;
  const [prompt, setPrompt] = useState(fields.get("prompt") ?? "How to take care of a horse:");
  const [sampling, setSampling] = useState<SamplingFields>(() =>
    Object.fromEntries(SAMPLING.map(({ name }) => [name, fields.get(name) ?? (name === "max_tokens" ? "48" : "")])),
  );
  const [writing, setWriting] = useState<Writing>();
  const [at, setAt] = useState<number>();
  const [colour, setColour] = useState(fields.get("colour") === "change" ? "change" : "probability");
  const { call, start, stop } = useAction((signal) => write(signal, prompt, readSampling(sampling), setWriting));
  const changes = useChanges(writing, colour === "change");
  const terms = useTerms(writing, at);

  function begin(): void {
    note({ prompt, ...sampling, colour });
    setWriting(undefined);
    setAt(undefined);
    void start();
  }

  return (
    <>
      <Heading title="Write">
        A text under a release or a draft, as it is made. Choose a token to see exactly what made it likely.
      </Heading>
      <div class="desk">
        <Form label="Write" class="asking" onSubmit={begin}>
          <Field label="Prompt" hint="Ctrl+Enter writes.">
            <Text rows={4} value={prompt} onValue={setPrompt} required />
          </Field>
          <Where />
          <SamplingForm values={sampling} onValue={(name, value) => setSampling({ ...sampling, [name]: value })} />
          <div class="buttons">
            <button class="primary">Write</button>
            {call.state === "running" && (
              <button type="button" onClick={stop}>
                Stop
              </button>
            )}
          </div>
          <Recipe {...recipe(prompt, sampling)} />
        </Form>
        <section class="answer" aria-label="Text" aria-busy={call.state === "running"}>
          {call.state === "refused" && <Refused refusal={call.refusal} />}
          {!writing && call.state !== "refused" && (
            <p class="quiet">{call.state === "running" ? "Reading the prompt …" : "Nothing is written yet."}</p>
          )}
          {writing && (
            <>
              <Field label="Colour tokens by">
                <select value={colour} onChange={(event) => setColour(event.currentTarget.value)}>
                  <option value="probability">how likely they were</option>
                  <option value="change">what the edits changed</option>
                </select>
              </Field>
              <TokenText
                label="Text"
                prompt={writing.prompt}
                selected={at}
                marked={marks(terms)}
                onSelect={setAt}
                tokens={writing.tokens.map((token, index) => {
                  const change = changes.state === "done" ? changes.value[index] : undefined;
                  return colour === "change"
                    ? { text: token.text, tint: changeTint(change), figure: factor(change) }
                    : {
                        text: token.text,
                        tint: probabilityTint(token.logProbability),
                        figure: percent(token.logProbability),
                      };
                })}
              />
              {colour === "change" ? (
                isSteered(writing) ? (
                  <Legend of="Beside the model without the edits, a token was" steps={CHANGE} />
                ) : (
                  <p class="quiet">This was the model unpatched: no edit changed anything.</p>
                )
              ) : (
                <Legend of="A token's probability was" steps={PROBABILITY} />
              )}
              {changes.state === "refused" && <Refused refusal={changes.refusal} />}
              <ServedBy served={writing.served}>{ending(writing)}</ServedBy>
              {at === undefined ? (
                <p class="quiet">Choose a token: its terms are shown here.</p>
              ) : (
                <TokenDetails writing={writing} at={at} terms={terms} />
              )}
            </>
          )}
        </section>
      </div>
    </>
  );
}

/** The tokens whose senses count most for the chosen one, by their share of the largest term. */
function marks(terms: ReturnType<typeof useTerms>): ReadonlyMap<number, number> | undefined {
  if (terms.state !== "done") return undefined;
  const sums = new Map<number, number>();
  for (const { position, contribution } of terms.value.contributions) {
    sums.set(position, (sums.get(position) ?? 0) + contribution);
  }
  const most = Math.max(...[...sums.values()].map(Math.abs));
  return new Map([...sums].map(([position, sum]) => [position, sum / most]));
}

function ending({ finish, usage, prompt, tokens }: Writing): string {
  const made = usage?.generatedTokens ?? tokens.length - prompt;
  if (finish === FinishReason.UNSPECIFIED) return `${made} tokens so far`;
  return `${made} tokens, ${finish === FinishReason.STOP ? "ended by itself" : "as many as were allowed"}`;
}

function recipe(prompt: string, sampling: SamplingFields) {
  const shown = draft.value.length
    ? `backpack try ${quoted(prompt)}${commandEdits()}${options(sampling, IN_TRY)}`
    : `backpack generate ${quoted(prompt)}${options(sampling)}`;
  const python = `${literal(prompt)}, Sampling(${keywords(sampling)})${pythonWhere()}`;
  return {
    shell: [shown + commandWhere(), `backpack explain ${quoted(prompt)}${commandWhere()}`],
    python: withClient(
      "Client, Sampling",
      `for part in client.stream(${python}):`,
      '    print(part.text, end="", flush=True)',
    ),
  };
}
