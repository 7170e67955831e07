import type { Position } from "backpack-serving-client/backpack_proto/v1/inference";
import { Role, type ApiKey } from "backpack-serving-client/backpack_proto/v1/interventions";
import { useState } from "preact/hooks";
import { Confirmed } from "../../parts/Confirmed";
import { Done } from "../../parts/Done";
import { Form } from "../../parts/Form";
import { Outcome } from "../../parts/Outcome";
import { id, time } from "../../parts/words";
import { once } from "../../session/once";
import { keep } from "../../session/secrets";
import { session, since } from "../../session/session";
import { useAction } from "../../session/useCall";
import { usePolled } from "../../session/usePolled";

const EVERY = 10;
const PAGE = 200;

const ROLES: Partial<Record<Role, string>> = {
  [Role.CALLER]: "caller: texts, scores, explanations",
  [Role.AUTHOR]: "author: patches, releases, drafts",
  [Role.RELEASER]: "releaser: what authors may, and channels",
};

export function Keys({ tenant }: { tenant: string }) {
  const signedIn = session.value!;
  const { tenants } = signedIn.backpack;
  const parent = `tenants/${tenant}`;
  const [roles, setRoles] = useState<Role[]>([Role.CALLER]);
  const listed = usePolled((signal) => tenants.listApiKeys({ parent, pageSize: PAGE }, { signal }), EVERY, [
    tenant,
    since.value,
  ]);
  const changed = useAction(async (_, change: () => Promise<string>) => change());
  const busy = changed.call.state === "running";

  const said = ({ secret, position }: { secret: string; position?: Position }): string => {
    if (session.value === signedIn) {
      keep({ tenant, secret });
      since.value = position;
    }
    return "";
  };
  // Secrets are shown by `NewKeys`, since one may have left this tenant's keys before the answer comes.
  const made = async (): Promise<string> => said(await tenants.createApiKey({ parent, roles, ...once() }));
  const rotated = (key: ApiKey) => async (): Promise<string> =>
    said(await tenants.rotateApiKey({ name: key.name, ...once() }));
  const revoked = (key: ApiKey) => async (): Promise<string> => {
    since.value = (await tenants.revokeApiKey({ name: key.name, ...once() })).position;
    return `The key ${id(key.name)} is revoked.`;
  };

  return (
    <section class="panel" aria-labelledby="keys">
      <h2 id="keys">Keys of {tenant}</h2>
      <Outcome call={changed.call} of="the intervention service">
        {(told) => told && <Done>{told}</Done>}
      </Outcome>
      <Outcome call={listed} of="the keys">
        {({ keys }) => (
          <ul class="keys">
            {keys.length === 0 && <li class="quiet">It has no key yet.</li>}
            {keys.map((key) => (
              <li key={key.name}>
                <code>{id(key.name)}</code> {key.roles.map((role) => Role[role].toLowerCase()).join(", ")}{" "}
                <span class="quiet">{time(key.createTime)}</span>{" "}
                {key.revoked ? (
                  <span class="warning">revoked</span>
                ) : (
                  <>
                    <Confirmed
                      label="Rotate"
                      of={id(key.name)}
                      means="This key ends, another takes its place."
                      disabled={busy}
                      onConfirm={() => void changed.start(rotated(key))}
                    />{" "}
                    <Confirmed
                      label="Revoke"
                      of={id(key.name)}
                      means="This key ends for ever."
                      disabled={busy}
                      onConfirm={() => void changed.start(revoked(key))}
                    />
                  </>
                )}
              </li>
            ))}
          </ul>
        )}
      </Outcome>
      <Form label={`Make a key of ${tenant}`} onSubmit={() => void changed.start(made)}>
        <fieldset>
          <legend>A new key</legend>
          {Object.entries(ROLES).map(([value, words]) => {
            const role = Number(value) as Role;
            return (
              <label key={role} class="check">
                <input
                  type="checkbox"
                  checked={roles.includes(role)}
                  onChange={({ currentTarget: { checked } }) =>
                    setRoles(checked ? [...roles, role] : roles.filter((one) => one !== role))
                  }
                />
                <span>{words}</span>
              </label>
            );
          })}
        </fieldset>
        <div class="buttons">
          <button class="primary" disabled={busy || roles.length === 0}>
            Make a key
          </button>
        </div>
      </Form>
    </section>
  );
}
