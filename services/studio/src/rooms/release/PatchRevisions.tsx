import { Outcome } from "../../parts/Outcome";
import { session, since } from "../../session/session";
import { useCall } from "../../session/useCall";
import { RevisionEdits } from "./RevisionEdits";

const SHOWN = 10;

/** The newest revisions of a patch, with their edits. */
export function PatchRevisions({ patch }: { patch: string }) {
  const { patches } = session.value!.backpack;
  const call = useCall(
    async (signal) => {
      const listed = await patches.listRevisions({ parent: `patches/${patch}`, pageSize: SHOWN }, { signal });
      const whole = listed.revisions.map(({ name }) => patches.getRevision({ name }, { signal }));
      return (await Promise.all(whole)).map((answer) => answer.revision!);
    },
    [patch, since.value],
  );
  return (
    <section class="panel" aria-labelledby="revisions">
      <h2 id="revisions">{patch}</h2>
      <Outcome call={call} of="its revisions">
        {(revisions) =>
          revisions.length === 0 ? (
            <p class="quiet">It has no revision yet.</p>
          ) : (
            revisions.map((revision) => <RevisionEdits key={revision.name} revision={revision} />)
          )
        }
      </Outcome>
    </section>
  );
}
