import type { ListSensesResponse, Sense } from "backpack-serving-client/backpack_proto/v1/inference";
import { useEffect, useRef } from "preact/hooks";
import { link } from "../../address";
import { ServedBy } from "../../parts/ServedBy";
import { TokenList } from "../../parts/TokenList";
import { visible } from "../../parts/words";

/** What each sense of a word raises, lowers, and lies near to. The chosen one is brought into view. */
export function SenseTable({ found, chosen }: { found: ListSensesResponse; chosen: string | null }) {
  const row = useRef<HTMLTableRowElement>(null);
  useEffect(() => row.current?.scrollIntoView({ block: "center" }), [chosen, found]);
  const word = found.token!.text;
  return (
    <>
      <h2>
        <code>{visible(word)}</code>
      </h2>
      <p>
        <a href={link("words", { view: "uses", word, token: String(found.token!.id) })}>Where it is used</a>
      </p>
      <div class="scroll" tabIndex={0} role="region" aria-label={`Senses of ${word.trim()}`}>
        <table class="senses">
          <thead>
            <tr>
              <th scope="col">sense</th>
              <th scope="col" class="figure">
                norm
              </th>
              <th scope="col">raises most</th>
              <th scope="col">lowers most</th>
              <th scope="col">words with the nearest sense</th>
            </tr>
          </thead>
          <tbody>
            {found.senses.map((sense) => {
              const isChosen = String(sense.sense) === chosen;
              return (
                <tr key={sense.sense} ref={isChosen ? row : null} class={isChosen ? "chosen" : ""}>
                  <th scope="row">
                    {sense.sense}
                    {sense.edited && <span class="tag">edited</span>}
                    <a
                      class="button small"
                      href={link("edit", { words: word.trim(), senses: String(sense.sense) })}
                      aria-label={`Edit sense ${sense.sense}`}
                    >
                      Edit
                    </a>
                    <a
                      class="button small"
                      href={link("words", { view: "map", sense: String(sense.sense), words: alike(word, sense) })}
                      aria-label={`Map sense ${sense.sense} beside its neighbours`}
                    >
                      Map
                    </a>
                  </th>
                  <td class="figure">{sense.norm.toFixed(2)}</td>
                  <td>
                    <TokenList label={`Sense ${sense.sense} raises`} tokens={sense.positive} />
                  </td>
                  <td>
                    <TokenList label={`Sense ${sense.sense} lowers`} tokens={sense.negative} />
                  </td>
                  <td>
                    <TokenList label={`Near sense ${sense.sense}`} tokens={sense.neighbours} digits={2} />
                  </td>
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
      <ServedBy served={found.served!} />
    </>
  );
}

/** A word and those whose same sense is nearest to its own: those that can be named, by a space before them. */
function alike(word: string, { neighbours }: Sense): string {
  const spelled = [word, ...neighbours.map(({ token }) => token!.text)].filter((text) => /^ \S+$/.test(text));
  return [...new Set(spelled.map((text) => text.trim()))].join(" ");
}
