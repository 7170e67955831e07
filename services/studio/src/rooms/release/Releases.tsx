import type { Release } from "backpack-serving-client/backpack_proto/v1/interventions";
import { useEffect } from "preact/hooks";
import { address, link } from "../../address";
import { asTenant, withSteering } from "../../parts/asking";
import { More } from "../../parts/More";
import { Outcome } from "../../parts/Outcome";
import { Recipe } from "../../parts/Recipe";
import { revisionId, time } from "../../parts/words";
import { session, since } from "../../session/session";
import { useAction } from "../../session/useCall";
import { ReleaseDetails } from "./ReleaseDetails";

interface Listed {
  releases: Release[];
  next: string;
}

const PAGE = 50;

export function Releases() {
  const list = async (signal: AbortSignal, before?: Listed): Promise<Listed> => {
    const request = { pageSize: PAGE, pageToken: before?.next ?? "" };
    const page = await session.value!.backpack.releases.listReleases(request, { signal });
    return { releases: [...(before?.releases ?? []), ...page.releases], next: page.nextPageToken };
  };
  const first = useAction((signal) => list(signal));
  const more = useAction(list);
  useEffect(() => void first.start(), [since.value]);
  const shown = more.call.state === "done" ? more.call : first.call;
  const chosen = address.value.fields.get("release") ?? "";
  return (
    <>
      {chosen && <ReleaseDetails key={chosen} number={chosen} />}
      <Outcome call={shown} of="the releases">
        {({ releases }) =>
          releases.length === 0 ? (
            <p class="quiet">There is no release yet. Draft an edit, and save it.</p>
          ) : (
            <div class="scroll" tabIndex={0} role="region" aria-label="Releases">
              <table>
                <thead>
                  <tr>
                    <th scope="col">release</th>
                    <th scope="col">revisions</th>
                    <th scope="col">what it is for</th>
                    <th scope="col">made</th>
                    <th scope="col">digest</th>
                  </tr>
                </thead>
                <tbody>
                  {releases.map((release) => (
                    <tr key={release.name} class={String(release.number) === chosen ? "chosen" : ""}>
                      <td>
                        <a href={link("release", { view: "releases", release: String(release.number) })}>
                          release {String(release.number)}
                        </a>
                      </td>
                      <td>{release.revisions.map(revisionId).join(", ") || "none: the model unpatched"}</td>
                      <td class="prose">{release.notes}</td>
                      <td>{time(release.createTime)}</td>
                      <td>
                        <code title={release.digest}>{release.digest.slice(0, 12)}</code>
                      </td>
                    </tr>
                  ))}
                </tbody>
              </table>
            </div>
          )
        }
      </Outcome>
      <More shown={shown} more={more} />
      <Recipe
        shell={[`backpack release list${asTenant()}`]}
        python={withSteering(
          "Steering",
          "for release in steering.releases():",
          "    print(release.number, *release.revisions)",
        )}
      />
    </>
  );
}
