import type { Position } from "backpack-serving-client/backpack_proto/v1/inference";
import { ReaderKind, type ReaderStatus } from "backpack-serving-client/backpack_proto/v1/sync";
import { Outcome } from "../../parts/Outcome";
import { Recipe } from "../../parts/Recipe";
import { session } from "../../session/session";
import { usePolled } from "../../session/usePolled";

const EVERY = 2;

/** All gateways and replicas: whether they are in touch, how far behind, how many releases they hold. */
export function Readers() {
  const call = usePolled((signal) => session.value!.backpack.fleet.listReaders({}, { signal }), EVERY, []);
  return (
    <>
      <Outcome call={call} of="the readers">
        {({ readers, position }) =>
          readers.length === 0 ? (
            <p class="quiet">No gateway or replica has been seen.</p>
          ) : (
            <div class="scroll" tabIndex={0} role="region" aria-label="Readers">
              <table>
                <caption>The store is at {at(position)}.</caption>
                <thead>
                  <tr>
                    <th scope="col">reader</th>
                    <th scope="col">state</th>
                    <th scope="col">at</th>
                    <th scope="col" class="figure">
                      heard before
                    </th>
                    <th scope="col" class="figure">
                      releases ready
                    </th>
                    <th scope="col">refuses</th>
                  </tr>
                </thead>
                <tbody>
                  {readers.map((reader) => (
                    <tr key={reader.incarnation}>
                      <td>
                        {reader.kind === ReaderKind.GATEWAY ? "gateway" : "replica"} {reader.reader}
                      </td>
                      <td class={isCurrent(reader, position) ? "fine" : "warning"}>{state(reader, position)}</td>
                      <td>{at(reader.position)}</td>
                      <td class="figure">{seconds(reader)} s</td>
                      <td class="figure">{reader.kind === ReaderKind.REPLICA ? reader.releases : ""}</td>
                      <td class="prose">
                        {reader.refusals
                          .map((one) => `${one.tenant}/${one.channel}: ${one.reason} ${one.message}`)
                          .join("\n")}
                      </td>
                    </tr>
                  ))}
                </tbody>
              </table>
            </div>
          )
        }
      </Outcome>
      <Recipe
        shell={["backpack fleet"]}
        python={[
          "from backpack_serving.client import Operator",
          "",
          'with Operator("127.0.0.1:8471", open("var/admin.key").read().strip()) as operator:',
          "    print(operator.fleet())",
        ]}
      />
    </>
  );
}

function isCurrent(reader: ReaderStatus, position: Position | undefined): boolean {
  return reader.connected && at(reader.position) === at(position);
}

function state(reader: ReaderStatus, position: Position | undefined): string {
  if (!reader.connected) return `out of touch ${reader.reason} ${reader.message}`.trim();
  return isCurrent(reader, position) ? "up to date" : "behind";
}

function at(position: Position | undefined): string {
  return position ? `${position.epoch}.${position.revision}` : "nothing yet";
}

function seconds({ silence }: ReaderStatus): string {
  return (Number(silence?.seconds ?? 0) + (silence?.nanos ?? 0) / 1e9).toFixed(1);
}
