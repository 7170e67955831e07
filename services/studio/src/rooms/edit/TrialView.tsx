import type { Token } from "backpack-serving-client/backpack_proto/v1/inference";
import { percent, visible } from "../../parts/words";
import type { Trial } from "./trial";

const SIDES = ["without", "with the edits"];

/** One prompt, without the edits and with them. */
export function TrialView({ trial: { prompt, sides } }: { trial: Trial }) {
  const same = sides[0].text === sides[1].text;
  return (
    <article class="trial" aria-label={prompt}>
      <div class="sides">
        {sides.map(({ text, next }, at) => (
          <section key={at} aria-label={SIDES[at]}>
            <h3>{SIDES[at]}</h3>
            <p class="written">
              <span class="quiet">{prompt}</span>
              {text}
            </p>
            <Chances label="Watched words" tokens={next.targets} />
            <Chances label="Likeliest next" tokens={next.top} />
          </section>
        ))}
      </div>
      {same && <p class="quiet">Both texts are the same.</p>}
    </article>
  );
}

function Chances({ label, tokens }: { label: string; tokens: Token[] }) {
  if (tokens.length === 0) return null;
  return (
    <>
      <h4>{label}</h4>
      <ul class="chips">
        {tokens.map((token) => (
          <li key={token.id}>
            <span class="chip">{visible(token.text)}</span> <span class="score">{percent(token.logProbability)}</span>
          </li>
        ))}
      </ul>
    </>
  );
}
