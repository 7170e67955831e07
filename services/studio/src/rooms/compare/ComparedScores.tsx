import { Legend } from "../../parts/Legend";
import { CHANGE, changeTint, factor, PROBABILITY, probabilityTint } from "../../parts/tint";
import { TokenText } from "../../parts/TokenText";
import { percent } from "../../parts/words";
import { title, type Comparison } from "./comparison";

/** How likely each token of the text is under the first release, and what the others change of that. */
export function ComparedScores({ comparison: { tokens, columns } }: { comparison: Comparison }) {
  const [first, ...others] = columns;
  const base = first!.score.logProbabilities;
  return (
    <section class="panel" aria-labelledby="scores">
      <h2 id="scores">How likely the text is</h2>
      <h3>
        {title(first!.name)}: perplexity {first!.score.perplexity.toFixed(2)}
      </h3>
      <TokenText
        label={`Text under ${title(first!.name)}`}
        tokens={tokens.map((token, at) => ({
          text: token.text,
          tint: probabilityTint(base[at - 1]),
          figure: percent(base[at - 1]),
        }))}
      />
      <Legend of="A token's probability is" steps={PROBABILITY} />
      {others.map(({ name, score }) => (
        <div key={name} class="compared-text">
          <h3>
            {title(name)}: perplexity {score.perplexity.toFixed(2)}
          </h3>
          <TokenText
            label={`Text under ${title(name)}`}
            tokens={tokens.map((token, at) => {
              const value = score.logProbabilities[at - 1];
              const change = value === undefined ? undefined : value - base[at - 1]!;
              return {
                text: token.text,
                tint: changeTint(change),
                figure: value === undefined ? "" : `${percent(value)}, ${factor(change)}`,
              };
            })}
          />
        </div>
      ))}
      {others.length > 0 && <Legend of={`Beside ${title(first!.name)}, a token is`} steps={CHANGE} />}
    </section>
  );
}
