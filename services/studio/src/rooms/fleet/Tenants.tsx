import { useState } from "preact/hooks";
import { address, link } from "../../address";
import { Confirmed } from "../../parts/Confirmed";
import { Done } from "../../parts/Done";
import { Field } from "../../parts/Field";
import { Form } from "../../parts/Form";
import { Input } from "../../parts/Input";
import { Outcome } from "../../parts/Outcome";
import { Recipe } from "../../parts/Recipe";
import { Refused } from "../../parts/Refused";
import { id, time } from "../../parts/words";
import { once } from "../../session/once";
import { session, since } from "../../session/session";
import { useAction } from "../../session/useCall";
import { usePolled } from "../../session/usePolled";
import { Keys } from "./Keys";

const EVERY = 10;
const PAGE = 500;

export function Tenants() {
  const { tenants } = session.value!.backpack;
  const call = usePolled((signal) => tenants.listTenants({ pageSize: PAGE }, { signal }), EVERY, [since.value]);
  const changed = useAction(async (_, name: string, suspended: boolean) => {
    const request = { names: [name], ...once() };
    const answer = await (suspended ? tenants.suspendTenants(request) : tenants.resumeTenants(request));
    since.value = answer.position;
    return `${id(name)} is ${suspended ? "suspended: all its keys are refused" : "resumed"}.`;
  });
  const busy = changed.call.state === "running";
  const chosen = address.value.fields.get("tenant");
  return (
    <div class="desk">
      <div class="asking">
        <CreateTenant />
        {chosen && <Keys key={chosen} tenant={chosen} />}
      </div>
      <section class="answer" aria-label="Answer">
        {changed.call.state === "refused" && <Refused refusal={changed.call.refusal} />}
        {changed.call.state === "done" && <Done>{changed.call.value}</Done>}
        <Outcome call={call} of="the tenants">
          {(listed) =>
            listed.tenants.length === 0 ? (
              <p class="quiet">There is no tenant yet.</p>
            ) : (
              <div class="scroll" tabIndex={0} role="region" aria-label="Tenants">
                <table>
                  <thead>
                    <tr>
                      <th scope="col">tenant</th>
                      <th scope="col">made</th>
                      <th scope="col">state</th>
                      <th scope="col">keys</th>
                      <th scope="col">change</th>
                    </tr>
                  </thead>
                  <tbody>
                    {listed.tenants.map((tenant) => (
                      <tr key={tenant.name} class={id(tenant.name) === chosen ? "chosen" : ""}>
                        <td>{id(tenant.name)}</td>
                        <td>{time(tenant.createTime)}</td>
                        <td class={tenant.suspended ? "warning" : ""}>{tenant.suspended ? "suspended" : "active"}</td>
                        <td>
                          <a
                            href={link("fleet", { tenant: id(tenant.name) })}
                            aria-label={`Keys of ${id(tenant.name)}`}
                          >
                            keys
                          </a>
                        </td>
                        <td>
                          {id(tenant.name) === "system" ? null : tenant.suspended ? (
                            <button
                              type="button"
                              class="small"
                              aria-label={`Resume ${id(tenant.name)}`}
                              disabled={busy}
                              onClick={() => void changed.start(tenant.name, false)}
                            >
                              Resume
                            </button>
                          ) : (
                            <Confirmed
                              label="Suspend"
                              of={id(tenant.name)}
                              means="All its keys are refused."
                              disabled={busy}
                              onConfirm={() => void changed.start(tenant.name, true)}
                            />
                          )}
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
          shell={["backpack tenant create NAME", "backpack tenant keys NAME", "backpack tenant suspend NAME"]}
          python={[
            "from backpack_serving.client import Operator",
            "",
            'with Operator("127.0.0.1:8471", open("var/admin.key").read().strip()) as operator:',
            '    operator.create_tenant("north")',
            '    print(operator.create_key("north", ["releaser", "caller"]).secret)',
          ]}
        />
      </section>
    </div>
  );
}

function CreateTenant() {
  const [name, setName] = useState("");
  const made = useAction(async () => {
    const answer = await session.value!.backpack.tenants.createTenant({ tenantId: name, ...once() });
    since.value = answer.position;
    return id(answer.tenant!.name);
  });
  return (
    <section class="panel" aria-labelledby="create">
      <h2 id="create">New tenant</h2>
      <Form label="Make a tenant" onSubmit={() => void made.start()}>
        <Field label="Name" hint="Small letters, digits and “-”, a letter first.">
          <Input value={name} onValue={setName} required pattern="[a-z][a-z0-9\-]{0,62}" />
        </Field>
        <div class="buttons">
          <button class="primary" disabled={made.call.state === "running"}>
            Make it
          </button>
        </div>
      </Form>
      <Outcome call={made.call} of="the intervention service">
        {(tenant) => (
          <Done>
            <p>{tenant} is made. It has no key yet.</p>
            <a class="button" href={link("fleet", { tenant })}>
              Make a key
            </a>
          </Done>
        )}
      </Outcome>
    </section>
  );
}
