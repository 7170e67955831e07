import { address, go, link, note } from "../../address";
import { Confirmed } from "../../parts/Confirmed";
import { Field } from "../../parts/Field";
import { Input } from "../../parts/Input";
import { JudgementView } from "../../parts/JudgementView";
import { Outcome } from "../../parts/Outcome";
import { Refused } from "../../parts/Refused";
import { once } from "../../session/once";
import { isNumber } from "../../session/request";
import { session, since } from "../../session/session";
import { useAction, useCall } from "../../session/useCall";
import { contents, difference } from "./contents";
import { RevisionEdits } from "./RevisionEdits";

const MOVED = 8;

/** What is in a release, what it does to ordinary text, and how it differs from another one. */
export function ReleaseDetails({ number }: { number: string }) {
  const against = address.value.fields.get("against") ?? "0";
  const found = useCall((signal) => contents(signal, number), [number]);
  const other = useCall(isNumber(against) ? (signal) => contents(signal, against) : null, [against]);
  const judged = useCall(
    number !== "0" && session.value!.mayCall
      ? (signal) => session.value!.backpack.inference.judge({ release: BigInt(number), limit: MOVED }, { signal })
      : null,
    [number],
  );
  const deleted = useAction(async () => {
    const answer = await session.value!.backpack.releases.deleteRelease({ name: `releases/${number}`, ...once() });
    since.value = answer.position;
    go("release", { view: "releases" });
  });
  return (
    <section class="panel" aria-labelledby="details">
      <h2 id="details">Release {number}</h2>
      <Outcome call={found} of="its revisions">
        {({ release, revisions }) => (
          <>
            <p>
              <code>{release.digest}</code>
            </p>
            {release.notes && <p class="prose">{release.notes}</p>}
            {revisions.length === 0 && <p class="quiet">No revisions: this is the model unpatched.</p>}
            {revisions.map((revision) => (
              <RevisionEdits key={revision.name} revision={revision} />
            ))}
          </>
        )}
      </Outcome>
      <Outcome call={judged} of="its judgement">
        {(judgement) => <JudgementView judgement={judgement} />}
      </Outcome>
      <div class="buttons">
        <a class="button primary" href={link("release", { release: number })}>
          Release it
        </a>
        <a class="button" href={link("write", { on: number })}>
          Write under it
        </a>
        <a class="button" href={link("compare", { with: ["0", "live", number] })}>
          Compare it
        </a>
        {found.state === "done" && !found.value.release.served && number !== "0" && (
          <Confirmed
            label="Delete"
            of={`release ${number}`}
            means="No channel was ever at it. Its number stays taken."
            disabled={deleted.call.state === "running"}
            onConfirm={() => void deleted.start()}
          />
        )}
      </div>
      {deleted.call.state === "refused" && <Refused refusal={deleted.call.refusal} />}
      <div class="short">
        <Field label="Differs from release">
          <Input value={against} onValue={(value) => note({ against: value })} />
        </Field>
      </div>
      {found.state === "done" && (
        <Outcome call={other} of="the other release" idle="Name a release by its number.">
          {(before) => {
            const { removed, added } = difference(before, found.value);
            if (removed.length + added.length === 0) return <p class="quiet">Both have the same edits.</p>;
            return (
              <pre class="difference" tabIndex={0} aria-label="Difference">
                {removed.map((line) => `− ${line}\n`)}
                {added.map((line) => `+ ${line}\n`)}
              </pre>
            );
          }}
        </Outcome>
      )}
    </section>
  );
}
