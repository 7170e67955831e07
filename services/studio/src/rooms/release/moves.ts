/** What moves a channel. Each needs the channel as it was seen: whoever moved it meanwhile isn't overruled. */

import { Wait, type Channel, type Rollout } from "backpack-serving-client/backpack_proto/v1/interventions";
import type { Position } from "backpack-serving-client/backpack_proto/v1/inference";
import { once } from "../../session/once";
import { session, since } from "../../session/session";

export type Move =
  | { kind: "activate"; release: bigint }
  | { kind: "rollback" }
  | { kind: "start"; release: bigint; permille: number }
  | { kind: "promote" }
  | { kind: "abort" };

export interface Moved {
  channel: Channel;
  rollout?: Rollout;
}

/**
 * Waits until more than half of the readers hold it, for ten seconds at most. A release that makes ordinary text much
 * worse is refused (DEGRADES), unless that is allowed.
 */
export async function move(channel: Channel, to: Move, allowDegradation: boolean): Promise<Moved> {
  const { releases } = session.value!.backpack;
  const request = { channel: channel.name, etag: channel.etag, wait: Wait.QUORUM, ...once() };
  const judged = { ...request, allowDegradation };
  const call = (): Promise<{ channel?: Channel; position?: Position; rollout?: Rollout }> => {
    switch (to.kind) {
      case "activate":
        return releases.activate({ ...judged, release: to.release });
      case "start":
        return releases.startCanary({ ...judged, release: to.release, permille: to.permille });
      case "promote":
        return releases.promoteCanary(judged);
      case "abort":
        return releases.abortCanary(request);
      case "rollback":
        return releases.rollback(request);
    }
  };
  const answer = await call();
  since.value = answer.position;
  return { channel: answer.channel!, ...(answer.rollout ? { rollout: answer.rollout } : {}) };
}
