import { address, link, ROOMS } from "../address";
import { session, signOut } from "../session/session";
import { DESCRIBED } from "./rooms";
import { choose, theme, THEMES, type Theme } from "./theme";

export function TopBar() {
  const now = session.value;
  return (
    <header class="top">
      <span class="brand">Backpack studio</span>
      {now && (
        <nav aria-label="Rooms">
          {ROOMS.filter((room) => DESCRIBED[room].isOpen(now)).map((room) => (
            <a key={room} href={link(room)} aria-current={address.value.room === room ? "page" : undefined}>
              {DESCRIBED[room].title}
            </a>
          ))}
        </nav>
      )}
      <div class="who">
        {now && <span title={now.model && `Model ${now.model.fingerprint}`}>{now.tenant || "operator"}</span>}
        <select aria-label="Theme" value={theme.value} onChange={(event) => choose(event.currentTarget.value as Theme)}>
          {THEMES.map((name) => (
            <option key={name}>{name}</option>
          ))}
        </select>
        {now && (
          <button type="button" onClick={signOut}>
            Sign out
          </button>
        )}
      </div>
    </header>
  );
}
