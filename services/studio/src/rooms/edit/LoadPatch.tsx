import { toJson } from "backpack-serving-client";
import { EditSchema } from "backpack-serving-client/backpack_proto/v1/edits";
import { useState } from "preact/hooks";
import { draft, setDraft } from "../../draft/draft";
import { readPatchFile } from "../../draft/patchFile";
import { Field } from "../../parts/Field";
import { Outcome } from "../../parts/Outcome";
import { Refused } from "../../parts/Refused";
import { id } from "../../parts/words";
import { session, since } from "../../session/session";
import { useAction, useCall } from "../../session/useCall";

const SHOWN = 200;

/** Edits of a stored revision, or of a file, put into the draft. */
export function LoadPatch() {
  const { patches } = session.value!.backpack;
  const listed = useCall(
    async (signal) => (await patches.listPatches({ pageSize: SHOWN }, { signal })).patches,
    [since.value],
  );
  const loaded = useAction(async (signal, name: string) => {
    const { revision } = await patches.getRevision({ name }, { signal });
    setDraft([...draft.value, ...revision!.edits.map((edit) => JSON.stringify(toJson(EditSchema, edit)))]);
  });
  const [wrong, setWrong] = useState("");

  async function read(file: File | undefined): Promise<void> {
    if (!file) return;
    try {
      setDraft([...draft.value, ...readPatchFile(await file.text(), session.value!.model?.fingerprint)]);
      setWrong("");
    } catch (error) {
      setWrong(`${file.name} is no patch file: ${(error as Error).message}`);
    }
  }

  return (
    <div class="asking">
      <Outcome call={listed} of="the patches">
        {(found) => {
          const some = found.filter((patch) => patch.latestRevision > 0n);
          return some.length === 0 ? (
            <p class="quiet">There is no patch with a revision yet.</p>
          ) : (
            <Field label="Newest revision of">
              <select value="" onChange={(event) => void loaded.start(event.currentTarget.value)}>
                <option value="">choose a patch</option>
                {some.map((patch) => (
                  <option key={patch.name} value={`${patch.name}/revisions/${patch.latestRevision}`}>
                    {id(patch.name)}:{String(patch.latestRevision)}
                  </option>
                ))}
              </select>
            </Field>
          );
        }}
      </Outcome>
      {loaded.call.state === "refused" && <Refused refusal={loaded.call.refusal} />}
      <Field label="Patch file" hint="JSON, as `backpack patch show` and `backpack lab` write it.">
        <input type="file" accept=".json" onChange={(event) => void read(event.currentTarget.files?.[0])} />
      </Field>
      {wrong && (
        <p class="refused" role="alert">
          {wrong}
        </p>
      )}
    </div>
  );
}
