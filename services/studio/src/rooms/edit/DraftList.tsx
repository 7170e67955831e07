import { create } from "backpack-serving-client";
import { EditSchema } from "backpack-serving-client/backpack_proto/v1/edits";
import { describe } from "../../draft/describe";
import { draft, setDraft } from "../../draft/draft";
import { parseLine } from "../../draft/line";

/** The edits of the draft, in the order in which they apply. */
export function DraftList() {
  if (draft.value.length === 0) {
    return <p class="quiet">No edits yet. Add one below, or choose “Edit” beside a sense in Words.</p>;
  }
  return (
    <ol class="draft">
      {draft.value.map((line, at) => {
        const { text, wrong } = read(line);
        return (
          <li key={`${at} ${line}`}>
            <code>{text}</code>{" "}
            <button
              type="button"
              class="small"
              aria-label={`Remove ${text}`}
              onClick={() => setDraft(draft.value.filter((_, index) => index !== at))}
            >
              Remove
            </button>
            {wrong && <p class="warning">{wrong}</p>}
          </li>
        );
      })}
    </ol>
  );
}

function read(line: string): { text: string; wrong?: string } {
  try {
    const edit = parseLine(line);
    return { text: line.startsWith("{") ? describe(create(EditSchema, edit)) : line };
  } catch (error) {
    return { text: line.slice(0, 80), wrong: (error as Error).message };
  }
}
