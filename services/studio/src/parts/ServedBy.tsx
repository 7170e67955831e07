import type { Served } from "backpack-serving-client/backpack_proto/v1/inference";
import type { ComponentChildren } from "preact";

/** The release that made an answer, by number and digest. */
export function ServedBy({ served, children }: { served: Served; children?: ComponentChildren }) {
  const { channel, release, releaseDigest, canary, draftDigest } = served;
  return (
    <p class="served">
      {children && <>{children}; </>}
      {channel && `${channel}, `}release {String(release)}
      {canary && " (the canary)"}
      {draftDigest && " with the draft"} <code title={releaseDigest}>{releaseDigest.slice(0, 12)}</code>
    </p>
  );
}
