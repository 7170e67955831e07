import type { ComponentType } from "preact";
import { Heading } from "../../parts/Heading";
import { viewOf, Views } from "../../parts/Views";
import { AuditTrail } from "./AuditTrail";
import { Channels } from "./Channels";
import { Patches } from "./Patches";
import { Releases } from "./Releases";

const VIEWS = { channels: "Channels", releases: "Releases", patches: "Patches", audit: "Audit" };

const SHOWN: Record<string, ComponentType> = {
  channels: Channels,
  releases: Releases,
  patches: Patches,
  audit: AuditTrail,
};

export function ReleaseRoom() {
  const View = SHOWN[viewOf(VIEWS)]!;
  return (
    <>
      <Heading title="Release">
        A release is an immutable list of revisions. A channel points at one; moving the pointer is all that changes
        what callers get.
      </Heading>
      <Views room="release" label="Release" views={VIEWS} />
      <View />
    </>
  );
}
