import type { Channel } from "backpack-serving-client/backpack_proto/v1/interventions";
import { address } from "../../address";
import { asTenant, withSteering } from "../../parts/asking";
import { Outcome } from "../../parts/Outcome";
import { Recipe } from "../../parts/Recipe";
import { id } from "../../parts/words";
import { isNumber } from "../../session/request";
import { session, since } from "../../session/session";
import { usePolled } from "../../session/usePolled";
import { ChannelCard } from "./ChannelCard";

const LIVE = "live";
const EVERY = 4;
const SHOWN = 200;

/** Each channel: where it points, its canary, who holds it, and how to move it. */
export function Channels() {
  const { releases } = session.value!.backpack;
  const call = usePolled(
    async (signal) => {
      const [channels, made] = await Promise.all([
        releases.listChannels({}, { signal }),
        releases.listReleases({ pageSize: SHOWN }, { signal }),
      ]);
      return { channels: channels.channels.toSorted(liveFirst), releases: made.releases };
    },
    EVERY,
    [since.value],
  );
  const field = address.value.fields.get("release") ?? "";
  const asked = isNumber(field) ? field : "";
  const named = asked || "1";
  return (
    <>
      <Outcome call={call} of="the channels">
        {(found) => (
          <div class="cards">
            {found.channels.map((channel) => (
              <ChannelCard
                key={channel.name}
                channel={channel}
                releases={found.releases}
                asked={id(channel.name) === LIVE ? asked : ""}
              />
            ))}
          </div>
        )}
      </Outcome>
      <Recipe
        shell={[
          `backpack release status${asTenant()}`,
          `backpack release activate ${named} --wait quorum${asTenant()}`,
          `backpack release rollback${asTenant()}`,
          `backpack canary start ${named} --permille 50${asTenant()}`,
          `backpack canary promote${asTenant()}`,
        ]}
        python={withSteering(
          "Steering",
          `move = steering.activate(${named}, wait="quorum")`,
          "steering.rollback()",
          `steering.start_canary(${named}, permille=50)`,
          "steering.promote_canary()  # or abort_canary()",
        )}
      />
    </>
  );
}

function liveFirst(one: Channel, other: Channel): number {
  return Number(id(other.name) === LIVE) - Number(id(one.name) === LIVE);
}
