/** A draft made a revision, and a release of it: as `backpack steer` does. */

import { Code, refusal } from "backpack-serving-client";
import type { Release, Revision } from "backpack-serving-client/backpack_proto/v1/interventions";
import { draftEdits } from "../../draft/draft";
import { channelOf } from "../../parts/words";
import { once } from "../../session/once";
import { session, since } from "../../session/session";

export interface Saved {
  revision: Revision;
  release: Release;
}

/** With the other patches of the channel's release, unless `alone`. What is refused is refused before anything is stored. */
export async function save(patch: string, description: string, channel: string, alone: boolean): Promise<Saved> {
  const { patches, releases } = session.value!.backpack;
  const parent = `patches/${patch}`;
  const edits = draftEdits();
  const others = alone ? [] : await otherRevisions(channel, patch);
  try {
    await patches.createRevision({ parent, edits, validateOnly: true });
  } catch (error) {
    const { code, reason } = refusal(error);
    if (code !== Code.NotFound || reason !== "NO_SUCH_PATCH") throw error;
    await patches.createPatch({ patchId: patch, description, ...once() });
  }
  const { revision } = await patches.createRevision({ parent, edits, ...once() });
  const made = await releases.createRelease({ revisions: [...others, revision!.name], notes: description, ...once() });
  since.value = made.position;
  return { revision: revision!, release: made.release! };
}

/** Those of the channel's release, or of its canary's for NAME:canary. Rejects where there is no such channel or canary. */
async function otherRevisions(channel: string, patch: string): Promise<string[]> {
  const { releases } = session.value!.backpack;
  const named = channelOf(channel);
  const { channel: found } = await releases.getChannel({ name: `channels/${named}` });
  const at = named === channel ? found!.release : found!.canary?.release;
  if (at === undefined) throw new Error(`${named} has no canary any more; choose another release to look at`);
  const { release } = await releases.getRelease({ name: `releases/${at}` });
  return release!.revisions.filter((name) => name.split("/")[3] !== patch);
}
