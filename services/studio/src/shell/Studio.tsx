import { address } from "../address";
import { session } from "../session/session";
import { Closed } from "./Closed";
import { DESCRIBED } from "./rooms";
import { SignIn } from "./SignIn";
import { TopBar } from "./TopBar";

export function Studio() {
  const { room } = address.value;
  const { Place, isOpen } = DESCRIBED[room];
  return (
    <>
      <a class="skip" href="#main" onClick={skip}>
        Skip to the content
      </a>
      <TopBar />
      {session.value ? (
        <main id="main" tabIndex={-1} key={room} class="room">
          {isOpen(session.value) ? <Place /> : <Closed room={room} />}
        </main>
      ) : (
        <SignIn />
      )}
    </>
  );
}

/** The address after the `#` is the room's, so a skip link can't have one of its own. */
function skip(event: Event): void {
  event.preventDefault();
  document.getElementById("main")?.focus();
}
