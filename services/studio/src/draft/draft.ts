/** The draft: edits that are tried over a release and stored nowhere but in the address. */

import { computed } from "@preact/signals";
import { address, note } from "../address";
import { parseLine, type EditInit } from "./line";

export const draft = computed(() => address.value.fields.getAll("edit"));

export function setDraft(lines: readonly string[]): void {
  note({ edit: lines });
}

/** As the API takes them. Throws for a line that is no edit: a draft is never tried in part. */
export function draftEdits(): EditInit[] {
  return draft.value.map(parseLine);
}

/** The same without the lines that are no edits, for what is only shown. */
export function readableEdits(): EditInit[] {
  return draft.value.flatMap((line) => {
    try {
      return [parseLine(line)];
    } catch {
      return [];
    }
  });
}
