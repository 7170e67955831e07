import type { AuditEntry } from "backpack-serving-client/backpack_proto/v1/interventions";
import { useEffect } from "preact/hooks";
import { asTenant, withSteering } from "../../parts/asking";
import { More } from "../../parts/More";
import { Outcome } from "../../parts/Outcome";
import { Recipe } from "../../parts/Recipe";
import { counted, time } from "../../parts/words";
import { session } from "../../session/session";
import { useAction, useCall } from "../../session/useCall";

interface Listed {
  entries: AuditEntry[];
  next: string;
}

const PAGE = 50;

/** Who changed what, newest first; the chain of hashes is verified as it is shown. */
export function AuditTrail() {
  const { audit } = session.value!.backpack;
  const list = async (signal: AbortSignal, before?: Listed): Promise<Listed> => {
    const request = { pageSize: PAGE, pageToken: before?.next ?? "" };
    const page = await audit.listAuditEntries(request, { signal });
    return { entries: [...(before?.entries ?? []), ...page.entries], next: page.nextPageToken };
  };
  const chain = useCall((signal) => audit.verifyChain({}, { signal }), []);
  const first = useAction((signal) => list(signal));
  const more = useAction(list);
  useEffect(() => void first.start(), []);
  const shown = more.call.state === "done" ? more.call : first.call;
  return (
    <>
      <Outcome call={chain} of="the chain">
        {({ intact, entries, firstBroken }) => (
          <p class={intact ? "fine" : "warning"}>
            {intact
              ? `The chain of ${counted(entries, "entry", "entries")} is intact.`
              : `The chain is broken at position ${firstBroken}.`}
          </p>
        )}
      </Outcome>
      <Outcome call={shown} of="the entries">
        {({ entries }) => (
          <div class="scroll" tabIndex={0} role="region" aria-label="Entries">
            <table>
              <thead>
                <tr>
                  <th scope="col" class="figure">
                    at
                  </th>
                  <th scope="col">time</th>
                  <th scope="col">who</th>
                  <th scope="col">did</th>
                  <th scope="col">to</th>
                  <th scope="col">known of the release</th>
                  <th scope="col">hash</th>
                </tr>
              </thead>
              <tbody>
                {entries.map((entry) => (
                  <tr key={String(entry.revision)}>
                    <td class="figure">{String(entry.revision)}</td>
                    <td>{time(entry.time)}</td>
                    <td class="prose">{entry.principal}</td>
                    <td>{entry.method}</td>
                    <td class="prose">{entry.resource}</td>
                    <td class="prose">{entry.judgement}</td>
                    <td>
                      <code title={entry.hash}>{entry.hash.slice(0, 12)}</code>
                    </td>
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
        )}
      </Outcome>
      <More shown={shown} more={more} />
      <Recipe
        shell={[`backpack audit${asTenant()}`]}
        python={withSteering(
          "Steering",
          "print(steering.verify_audit())",
          "for entry in steering.audit(20):",
          "    print(entry.revision, entry.who, entry.method, entry.resource)",
        )}
      />
    </>
  );
}
