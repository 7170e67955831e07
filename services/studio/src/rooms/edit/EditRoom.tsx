import { useState } from "preact/hooks";
import { draft } from "../../draft/draft";
import { Heading } from "../../parts/Heading";
import { Where } from "../../parts/Where";
import { AddEdit } from "./AddEdit";
import { DraftList } from "./DraftList";
import { LoadPatch } from "./LoadPatch";
import { SaveDraft } from "./SaveDraft";
import { TryDraft } from "./TryDraft";

export function EditRoom() {
  const [loading, setLoading] = useState(false);
  return (
    <>
      <Heading title="Edit">
        A draft of edits, tried beside the model without them. Nothing is stored until you save it as a revision.
      </Heading>
      <div class="desk">
        <div class="asking">
          <section class="panel" aria-labelledby="draft">
            <h2 id="draft">Draft</h2>
            <DraftList />
          </section>
          <section class="panel" aria-labelledby="add">
            <h2 id="add">Add an edit</h2>
            <AddEdit />
            <details onToggle={(event) => setLoading(event.currentTarget.open)}>
              <summary>From a patch, or a file</summary>
              {loading && <LoadPatch />}
            </details>
          </section>
          <section class="panel" aria-label="Release below the draft">
            <Where />
          </section>
        </div>
        <div class="answer">
          <TryDraft />
          {draft.value.length > 0 && <SaveDraft />}
        </div>
      </div>
    </>
  );
}
