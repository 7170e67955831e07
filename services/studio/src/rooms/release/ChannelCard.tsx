import type { Channel, Release } from "backpack-serving-client/backpack_proto/v1/interventions";
import { useState } from "preact/hooks";
import { Done } from "../../parts/Done";
import { Refused } from "../../parts/Refused";
import { counted, id, time } from "../../parts/words";
import { useAction } from "../../session/useCall";
import { Holders } from "./Holders";
import { MoveChannel } from "./MoveChannel";
import { move, type Move, type Moved } from "./moves";

interface Props {
  channel: Channel;
  releases: Release[];
  /** The release that the address asks for, if it does. */
  asked: string;
}

/** A move, and the channel as it was when one asked for it: who moved it meanwhile isn't overruled by a second yes. */
interface Wanted {
  from: Channel;
  to: Move;
}

export function ChannelCard({ channel, releases, asked }: Props) {
  const [wanted, setWanted] = useState<Wanted>();
  const moving = useAction((_, { from, to }: Wanted, allowed: boolean) => move(from, to, allowed));
  const name = id(channel.name);
  const { canary, previousRelease: before } = channel;
  const busy = moving.call.state === "running";
  const begin = (to: Move): void => {
    const now = { from: channel, to };
    setWanted(now);
    void moving.start(now, false);
  };
  return (
    <section class="panel" aria-labelledby={`channel-${name}`}>
      <h2 id={`channel-${name}`}>{name}</h2>
      <p>
        At <strong>release {String(channel.release)}</strong>
        {before !== undefined && <>, before that at release {String(before)}</>}, since {time(channel.updateTime)}.{" "}
        <code title={channel.releaseDigest}>{channel.releaseDigest.slice(0, 12)}</code>
      </p>
      {canary && (
        <p>
          Canary: <strong>release {String(canary.release)}</strong> for {canary.permille} in a thousand requests.
        </p>
      )}
      {channel.judgement && <p class="quiet">What was known of it then: {channel.judgement}.</p>}
      {channel.canaryAbortReason && (
        <p class="warning">The service ended the last canary: {channel.canaryAbortReason}</p>
      )}
      <div class="buttons">
        {canary && (
          <>
            <button type="button" class="primary" disabled={busy} onClick={() => begin({ kind: "promote" })}>
              Promote the canary
            </button>
            <button type="button" disabled={busy} onClick={() => begin({ kind: "abort" })}>
              End the canary
            </button>
          </>
        )}
        {before !== undefined && (
          <button type="button" disabled={busy} onClick={() => begin({ kind: "rollback" })}>
            Roll back to release {String(before)}
          </button>
        )}
      </div>
      {moving.call.state === "running" && (
        <p class="quiet" role="status">
          Waiting until most readers hold it …
        </p>
      )}
      {moving.call.state === "refused" && <Refused refusal={moving.call.refusal} />}
      {moving.call.state === "refused" && moving.call.refusal.reason === "DEGRADES" && wanted && (
        <div class="buttons">
          <button type="button" onClick={() => void moving.start(wanted, true)}>
            Move it all the same
          </button>
        </div>
      )}
      {moving.call.state === "done" && <Done>{outcome(moving.call.value)}</Done>}
      <MoveChannel asked={asked} channel={channel} releases={releases} busy={busy} onMove={begin} />
      <Holders channel={channel.name} />
    </section>
  );
}

function outcome({ channel, rollout }: Moved): string {
  const canary = channel.canary ? ` with release ${channel.canary.release} as its canary` : "";
  const held = rollout
    ? ` ${rollout.complete ? "Held" : "Not yet held by most: held"} by ${rollout.replicasAcked} of ` +
      `${counted(rollout.replicas, "replica")}, ${rollout.gatewaysAcked} of ${counted(rollout.gateways, "gateway")}.` +
      rollout.refusals.map((one) => ` ${one}.`).join("")
    : "";
  return `${id(channel.name)} is at release ${channel.release}${canary}.${held}`;
}
