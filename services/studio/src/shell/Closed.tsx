import type { Room } from "../address";
import { Heading } from "../parts/Heading";
import { session } from "../session/session";
import { DESCRIBED } from "./rooms";

/** A room that this key doesn't open. */
export function Closed({ room }: { room: Room }) {
  const { title, role } = DESCRIBED[room];
  const tenant = session.value!.tenant;
  return (
    <>
      <Heading title={title}>This room needs a key with the role {role}, which this key hasn't.</Heading>
      {tenant && room !== "fleet" ? (
        <p class="quiet">
          An operator makes one: <code>backpack tenant key {tenant} --role releaser --role caller</code>
        </p>
      ) : (
        <p class="quiet">Sign out, and sign in with another key.</p>
      )}
    </>
  );
}
