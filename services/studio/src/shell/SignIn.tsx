import { useEffect, useState } from "preact/hooks";
import { Field } from "../parts/Field";
import { Form } from "../parts/Form";
import { Input } from "../parts/Input";
import { Outcome } from "../parts/Outcome";
import { signIn, storedKey } from "../session/session";
import { useAction } from "../session/useCall";

export function SignIn() {
  const [key, setKey] = useState("");
  const { call, start } = useAction((_, given: string) => signIn(given));
  useEffect(() => {
    const stored = storedKey();
    if (stored) void start(stored);
  }, []);
  return (
    <main id="main" class="sign-in">
      <h1>Backpack studio</h1>
      <p>
        Look into a Backpack language model, change what its words mean, and release the change. Sign in with an API key
        of your tenant.
      </p>
      <Form label="Sign in" onSubmit={() => key.trim() && void start(key.trim())}>
        <Field
          label="API key"
          hint="Kept in this tab until it is closed, and sent to this server only. `backpack run` writes keys into var/, such as var/harbour.key."
        >
          <Input type="password" value={key} onValue={setKey} required />
        </Field>
        <button class="primary">Sign in</button>
      </Form>
      <Outcome call={call} of="the server">
        {() => null}
      </Outcome>
    </main>
  );
}
