import type { ReplicaLoad } from "backpack-serving-client/backpack_proto/v1/inference";
import { Bar } from "../../parts/Bar";
import { Outcome } from "../../parts/Outcome";
import { Recipe } from "../../parts/Recipe";
import { session } from "../../session/session";
import { usePolled } from "../../session/usePolled";

const EVERY = 2;

/** The replicas of the model, as the gateway's router sees them. */
export function Replicas() {
  const call = usePolled((signal) => session.value!.backpack.inference.listReplicas({}, { signal }), EVERY, []);
  return (
    <>
      <Outcome call={call} of="the replicas">
        {({ replicas }) =>
          replicas.length === 0 ? (
            <p class="quiet">The gateway knows of no replica of its model: it answers nobody until one reports.</p>
          ) : (
            <>
              <Loads replicas={replicas} />
              <p class="hint">
                As one gateway sees them. Load is tokens still to be read or made, for each slot: the gateway sends a
                request to the less loaded of two replicas.
              </p>
            </>
          )
        }
      </Outcome>
      <Recipe
        shell={["backpack replicas"]}
        python={[
          "from backpack_serving.client import Client",
          "",
          'with Client("127.0.0.1:8470", open("var/admin.key").read().strip()) as gateway:',
          "    print(gateway.replicas())",
        ]}
      />
    </>
  );
}

function Loads({ replicas }: { replicas: ReplicaLoad[] }) {
  const most = Math.max(...replicas.map(({ load }) => load));
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label="Replicas">
      <table>
        <thead>
          <tr>
            <th scope="col">replica</th>
            <th scope="col">address</th>
            <th scope="col">state</th>
            <th scope="col" class="figure">
              run
            </th>
            <th scope="col" class="figure">
              wait
            </th>
            <th scope="col" class="figure">
              slots
            </th>
            <th scope="col" class="figure">
              tokens to go
            </th>
            <th scope="col" class="figure">
              sent from here
            </th>
            <th scope="col" class="figure">
              load
            </th>
            <th aria-hidden="true" />
          </tr>
        </thead>
        <tbody>
          {replicas.map(({ replica, sent, load, usable }) => (
            <tr key={replica!.id}>
              <td>
                <code>{replica!.id}</code>
              </td>
              <td>{replica!.address}</td>
              <td class={usable ? "fine" : "warning"}>{state(replica!.draining, usable)}</td>
              <td class="figure">{replica!.running}</td>
              <td class="figure">{replica!.queued}</td>
              <td class="figure">{replica!.slots}</td>
              <td class="figure">{String(replica!.tokensInFlight)}</td>
              <td class="figure">{String(sent)}</td>
              <td class="figure">{load.toFixed(1)}</td>
              <td>
                <Bar value={load} most={most} />
              </td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

function state(draining: boolean, usable: boolean): string {
  if (draining) return "drains: takes nothing new";
  return usable ? "takes requests" : "left alone for a moment: a call failed";
}
