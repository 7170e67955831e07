import { link } from "../../address";
import { Bar } from "../../parts/Bar";
import { SenseLink } from "../../parts/SenseLink";
import { ServedBy } from "../../parts/ServedBy";
import { signed, visible } from "../../parts/words";
import type { Found } from "./search";

export function FoundTable({ found: { senses, served } }: { found: Found }) {
  const inPrompts = senses.some((sense) => sense.contribution !== undefined);
  const size = (sense: Found["senses"][number]) => sense.contribution ?? sense.score;
  const most = Math.max(...senses.map((sense) => Math.abs(size(sense))));
  if (senses.length === 0) return <p class="quiet">No sense does that.</p>;
  return (
    <>
      <div class="scroll" tabIndex={0} role="region" aria-label="Found senses">
        <table>
          <thead>
            <tr>
              <th scope="col">word</th>
              <th scope="col">sense</th>
              <th scope="col" class="figure">
                score
              </th>
              <th scope="col" class="figure">
                in a million
              </th>
              {inPrompts && (
                <>
                  <th scope="col" class="figure">
                    adds
                  </th>
                  <th scope="col" class="figure">
                    prompts
                  </th>
                </>
              )}
              <th aria-hidden="true" />
              <th scope="col">edit</th>
            </tr>
          </thead>
          <tbody>
            {senses.map((sense) => {
              const { token, score, frequency, contribution, prompts, edited } = sense;
              const cell = { words: token!.text.trim(), senses: String(sense.sense) };
              return (
                <tr key={`${token!.id} ${sense.sense}`}>
                  <td>
                    <code>{visible(token!.text)}</code> {edited && <span class="tag">edited</span>}
                  </td>
                  <td>
                    <SenseLink token={token!} sense={sense.sense} />
                  </td>
                  <td class="figure">{signed(score)}</td>
                  <td class="figure">{frequency?.toFixed(1)}</td>
                  {inPrompts && (
                    <>
                      <td class="figure">{signed(contribution ?? 0, 3)}</td>
                      <td class="figure">{prompts}</td>
                    </>
                  )}
                  <td>
                    <Bar value={size(sense)} most={most} />
                  </td>
                  <td>
                    <a
                      class="button small"
                      href={link("edit", cell)}
                      aria-label={`Edit sense ${sense.sense} of ${visible(token!.text)}`}
                    >
                      Edit
                    </a>
                  </td>
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
      <ServedBy served={served} />
    </>
  );
}
