/** What releases are made of, and how two differ. */

import type { Release, Revision } from "backpack-serving-client/backpack_proto/v1/interventions";
import { describe } from "../../draft/describe";
import { revisionId } from "../../parts/words";
import { session } from "../../session/session";

export interface Contents {
  release: Release;
  revisions: Revision[];
}

export async function contents(signal: AbortSignal, number: string): Promise<Contents> {
  const { patches, releases } = session.value!.backpack;
  const { release } = await releases.getRelease({ name: `releases/${number}` }, { signal });
  const answers = await Promise.all(release!.revisions.map((name) => patches.getRevision({ name }, { signal })));
  return { release: release!, revisions: answers.map((answer) => answer.revision!) };
}

export interface Difference {
  removed: string[];
  added: string[];
}

/** Lines of one that the other lacks, each with the revision that it is of. */
export function difference(before: Contents, after: Contents): Difference {
  const [old, now] = [lines(before), lines(after)];
  return { removed: without(old, now), added: without(now, old) };
}

function lines({ revisions }: Contents): string[] {
  return revisions.flatMap((revision) =>
    revision.edits.map((edit) => `${revisionId(revision.name)}  ${describe(edit)}`),
  );
}

function without(some: string[], others: string[]): string[] {
  const known = new Set(others);
  return some.filter((line) => !known.has(line));
}
