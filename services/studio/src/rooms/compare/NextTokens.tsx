import type { Token } from "backpack-serving-client/backpack_proto/v1/inference";
import { Bar } from "../../parts/Bar";
import { percent, visible } from "../../parts/words";
import { title, type Column } from "./comparison";

/** The likeliest next tokens, and the words that are watched, under each release. */
export function NextTokens({ columns }: { columns: Column[] }) {
  const most = Math.max(...columns.flatMap(({ next }) => [...next.top, ...next.targets].map(probability)));
  return (
    <section class="panel" aria-labelledby="next">
      <h2 id="next">What comes next</h2>
      <div class="scroll" tabIndex={0} role="region" aria-label="Likeliest next tokens">
        <table class="compared">
          <thead>
            <tr>
              {columns.map(({ name, served }) => (
                <th key={name} scope="col">
                  {title(name)}
                  <br />
                  <code title={served.releaseDigest}>
                    {String(served.release)} {served.releaseDigest.slice(0, 8)}
                  </code>
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {rows(columns, most, (column) => column.next.top)}
            {rows(columns, most, (column) => column.next.targets, "watched")}
          </tbody>
        </table>
      </div>
    </section>
  );
}

function rows(columns: Column[], most: number, tokens: (column: Column) => Token[], kind = "") {
  const length = Math.max(...columns.map((column) => tokens(column).length));
  return Array.from({ length }, (_, rank) => (
    <tr key={`${kind} ${rank}`} class={kind}>
      {columns.map((column) => {
        const token = tokens(column)[rank];
        return (
          <td key={column.name}>
            {token && (
              <>
                <span class="chip">{visible(token.text)}</span>{" "}
                <span class="score">{percent(token.logProbability)}</span>
                <Bar value={probability(token)} most={most} />
              </>
            )}
          </td>
        );
      })}
    </tr>
  ));
}

function probability(token: Token): number {
  return Math.exp(token.logProbability ?? -Infinity);
}
