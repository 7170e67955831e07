import type { Revision } from "backpack-serving-client/backpack_proto/v1/interventions";
import { describe } from "../../draft/describe";
import { counted, revisionId, time } from "../../parts/words";

const SHOWN = 40;

export function RevisionEdits({ revision }: { revision: Revision }) {
  const { name, digest, edits, createTime } = revision;
  return (
    <article class="revision" aria-label={revisionId(name)}>
      <h3>
        {revisionId(name)} <code title={digest}>{digest.slice(0, 12)}</code>{" "}
        <span class="quiet">{time(createTime)}</span>
      </h3>
      <ul>
        {edits.slice(0, SHOWN).map((edit, at) => (
          <li key={at}>
            <code>{describe(edit)}</code>
          </li>
        ))}
      </ul>
      {edits.length > SHOWN && <p class="quiet">and {counted(edits.length - SHOWN, "edit")} more</p>}
    </article>
  );
}
