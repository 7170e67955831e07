import { address, link } from "../../address";
import { asTenant, withSteering } from "../../parts/asking";
import { Outcome } from "../../parts/Outcome";
import { Recipe } from "../../parts/Recipe";
import { id, quoted, time } from "../../parts/words";
import { session, since } from "../../session/session";
import { useCall } from "../../session/useCall";
import { PatchRevisions } from "./PatchRevisions";

const SHOWN = 200;

export function Patches() {
  const call = useCall(
    (signal) => session.value!.backpack.patches.listPatches({ pageSize: SHOWN }, { signal }),
    [since.value],
  );
  const chosen = address.value.fields.get("patch");
  return (
    <>
      {chosen && <PatchRevisions key={chosen} patch={chosen} />}
      <Outcome call={call} of="the patches">
        {({ patches }) =>
          patches.length === 0 ? (
            <p class="quiet">There is no patch yet. Draft an edit, and save it.</p>
          ) : (
            <div class="scroll" tabIndex={0} role="region" aria-label="Patches">
              <table>
                <thead>
                  <tr>
                    <th scope="col">patch</th>
                    <th scope="col" class="figure">
                      newest revision
                    </th>
                    <th scope="col">description</th>
                    <th scope="col">made</th>
                  </tr>
                </thead>
                <tbody>
                  {patches.map((patch) => (
                    <tr key={patch.name} class={id(patch.name) === chosen ? "chosen" : ""}>
                      <td>
                        <a href={link("release", { view: "patches", patch: id(patch.name) })}>{id(patch.name)}</a>
                      </td>
                      <td class="figure">{String(patch.latestRevision)}</td>
                      <td class="prose">{patch.description}</td>
                      <td>{time(patch.createTime)}</td>
                    </tr>
                  ))}
                </tbody>
              </table>
            </div>
          )
        }
      </Outcome>
      <Recipe
        shell={[`backpack patch list${asTenant()}`, `backpack patch show ${quoted(chosen ?? "NAME")}${asTenant()}`]}
        python={withSteering("Steering", "for patch in steering.patches():", "    print(patch.id, patch.description)")}
      />
    </>
  );
}
