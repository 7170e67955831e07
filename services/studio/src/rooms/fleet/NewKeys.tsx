import { Done } from "../../parts/Done";
import { putAway, secrets } from "../../session/secrets";

/** Secrets stay, whichever tenant and room one goes to meanwhile, until somebody says that they are kept. */
export function NewKeys() {
  return (
    <>
      {secrets.value.map((key) => (
        <Done key={key.secret}>
          <p>The new key of {key.tenant}, shown this once and stored nowhere:</p>
          <code class="secret">{key.secret}</code>
          <div class="buttons">
            <button type="button" onClick={() => putAway(key)}>
              I have kept it
            </button>
          </div>
        </Done>
      ))}
    </>
  );
}
