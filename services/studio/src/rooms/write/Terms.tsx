import type { ExplainResponse } from "backpack-serving-client/backpack_proto/v1/inference";
import { Bar } from "../../parts/Bar";
import { SenseLink } from "../../parts/SenseLink";
import { percent, signed, visible } from "../../parts/words";

/** The terms of the sum that is a token's logit, largest first, and what isn't listed of it. */
export function Terms({ explained }: { explained: ExplainResponse }) {
  const { target, logit, contributions, unlisted, bias } = explained;
  const most = Math.max(...contributions.map((term) => Math.abs(term.contribution)), Math.abs(unlisted));
  const rest = [
    ...(bias ? [{ name: "the release's bias", value: bias }] : []),
    { name: "all others", value: unlisted },
  ];
  const topics = contributions.some((term) => term.multiplier !== 1);
  return (
    <table class="terms">
      <caption>
        <code>{visible(target!.text)}</code> had {percent(target!.logProbability)}. Its logit, {signed(logit)}, is the
        sum of:
      </caption>
      <thead>
        <tr>
          <th scope="col">token</th>
          <th scope="col" class="figure">
            at
          </th>
          <th scope="col">sense</th>
          <th scope="col" class="figure">
            <abbr title="the sense weight, which no release changes">α</abbr>
          </th>
          {topics && (
            <th scope="col" class="figure">
              <abbr title="what topics of the release multiply the sense by">× topic</abbr>
            </th>
          )}
          <th scope="col" class="figure">
            adds
          </th>
          <th aria-hidden="true" />
        </tr>
      </thead>
      <tbody>
        {contributions.map((term) => (
          <tr key={`${term.position} ${term.sense}`}>
            <td>
              <code>{visible(term.token!.text)}</code>
            </td>
            <td class="figure">{term.position}</td>
            <td>
              <SenseLink token={term.token!} sense={term.sense} />
            </td>
            <td class="figure">{term.weight.toFixed(3)}</td>
            {topics && <td class="figure">{term.multiplier.toFixed(2)}</td>}
            <td class="figure">{signed(term.contribution)}</td>
            <td>
              <Bar value={term.contribution} most={most} />
            </td>
          </tr>
        ))}
        {rest.map(({ name, value }) => (
          <tr key={name}>
            <td colSpan={topics ? 5 : 4}>{name}</td>
            <td class="figure">{signed(value)}</td>
            <td>
              <Bar value={value} most={most} />
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}
