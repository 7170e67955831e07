import { HoldState, ReaderKind } from "backpack-serving-client/backpack_proto/v1/sync";
import { Outcome } from "../../parts/Outcome";
import { counted } from "../../parts/words";
import { session, since } from "../../session/session";
import { usePolled } from "../../session/usePolled";

const EVERY = 3;

const STATES: Record<HoldState, string> = {
  [HoldState.UNSPECIFIED]: "unknown",
  [HoldState.STAGED]: "ready",
  [HoldState.ACKED]: "holds it",
  [HoldState.NACKED]: "refuses it",
  [HoldState.STALE]: "behind",
};

/** Whether each gateway and replica, of the first 1,000, holds a channel's releases; what gateways counted under its
 * canary. */
export function Holders({ channel }: { channel: string }) {
  const call = usePolled((signal) => session.value!.backpack.fleet.getRollout({ channel }, { signal }), EVERY, [
    channel,
    since.value,
  ]);
  return (
    <Outcome call={call} of="who holds it">
      {({ holds, canary, nextPageToken }) => (
        <>
          <div class="scroll" tabIndex={0} role="region" aria-label="Who holds it">
            <table>
              <thead>
                <tr>
                  <th scope="col">reader</th>
                  <th scope="col">release</th>
                  <th scope="col">state</th>
                  <th scope="col">store at</th>
                </tr>
              </thead>
              <tbody>
                {holds.map((hold) => (
                  <tr key={`${hold.incarnation} ${hold.release} ${hold.canary}`}>
                    <td>
                      {hold.kind === ReaderKind.GATEWAY ? "gateway" : "replica"} {hold.reader}
                    </td>
                    <td>
                      {String(hold.release)}
                      {hold.canary && " (canary)"}
                    </td>
                    <td class={hold.state === HoldState.ACKED ? "fine" : "warning"}>
                      {STATES[hold.state]}
                      {hold.reason && `: ${hold.reason} ${hold.message}`}
                    </td>
                    <td>
                      {String(hold.position?.epoch ?? 0)}.{String(hold.position?.revision ?? 0)}
                    </td>
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
          {holds.length === 0 && <p class="quiet">No gateway or replica is connected.</p>}
          {nextPageToken && <p class="quiet">There are more. `backpack release status` lists them all.</p>}
          {canary && (
            <p>
              Under the canary: {counted(canary.requests, "request")}, {String(canary.errors)} failed,{" "}
              {String(canary.nonFinite)} not finite.
            </p>
          )}
        </>
      )}
    </Outcome>
  );
}
