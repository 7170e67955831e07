import type { ListUsesResponse, WordUse } from "backpack-serving-client/backpack_proto/v1/inference";
import { Bar } from "../../parts/Bar";
import { SenseLink } from "../../parts/SenseLink";
import { ServedBy } from "../../parts/ServedBy";
import { counted, signed, visible } from "../../parts/words";

const SHOWN = 3;

/** Which senses speak in all the uses together, then each use with those that spoke most there. */
export function UseList({ found }: { found: ListUsesResponse }) {
  const { token, uses, occurrences, textTokens, served } = found;
  if (uses.length === 0) {
    return (
      <p class="quiet">
        <code>{visible(token!.text)}</code> doesn't stand in the model's held-out text of{" "}
        {textTokens.toLocaleString("en")} tokens.
      </p>
    );
  }
  return (
    <>
      <h2>
        <code>{visible(token!.text)}</code>
      </h2>
      <p class="quiet">
        {uses.length} of {counted(occurrences, "use")} in {textTokens.toLocaleString("en")} tokens. A sense adds so much
        to the logits of the up to 16 tokens that follow, less what it adds to all words.
      </p>
      <Means found={found} />
      <ol class="uses">
        {uses.map((use, at) => (
          <li key={at}>
            <Quoted use={use} word={token!.text} />
            <ul class="terms">
              {largest(use).map(({ sense, contribution, strongest }) => (
                <li key={sense}>
                  <SenseLink token={token!} sense={sense} /> {signed(contribution, 1)}, most for{" "}
                  <code>{visible(use.after[strongest]!.text)}</code>
                </li>
              ))}
            </ul>
          </li>
        ))}
      </ol>
      <ServedBy served={served!} />
    </>
  );
}

function Quoted({ use: { before, after }, word }: { use: WordUse; word: string }) {
  return (
    <q>
      {before
        .map(({ text }) => text)
        .join("")
        .trimStart()}
      <mark>{word}</mark>
      {after.map(({ text }) => text).join("")}
    </q>
  );
}

function largest({ senses }: WordUse) {
  return senses
    .map(({ contribution, strongest }, sense) => ({ sense, contribution, strongest }))
    .sort((one, other) => Math.abs(other.contribution) - Math.abs(one.contribution))
    .slice(0, SHOWN);
}

function Means({ found: { token, uses } }: { found: ListUsesResponse }) {
  const means = uses[0]!.senses
    .map((_, sense) => ({
      sense,
      mean: uses.reduce((sum, { senses }) => sum + senses[sense]!.contribution, 0) / uses.length,
      first: uses.filter((use) => largest(use)[0]!.sense === sense).length,
    }))
    .sort((one, other) => Math.abs(other.mean) - Math.abs(one.mean));
  const most = Math.abs(means[0]!.mean);
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label="Senses in these uses">
      <table>
        <thead>
          <tr>
            <th scope="col">sense</th>
            <th scope="col" class="figure">
              adds, on average
            </th>
            <th aria-hidden="true" />
            <th scope="col" class="figure">
              largest in
            </th>
          </tr>
        </thead>
        <tbody>
          {means.map(({ sense, mean, first }) => (
            <tr key={sense}>
              <td>
                <SenseLink token={token!} sense={sense} />
              </td>
              <td class="figure">{signed(mean)}</td>
              <td>
                <Bar value={mean} most={most} />
              </td>
              <td class="figure">{first > 0 && `${first} of ${uses.length}`}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}
