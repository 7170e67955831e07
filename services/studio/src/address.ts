/** Where one is: a room, and what is asked in it, after the `#`. Servers see none of it, and it can be shared. */

import { computed, signal } from "@preact/signals";

export const ROOMS = ["write", "words", "edit", "compare", "release", "fleet"] as const;
export type Room = (typeof ROOMS)[number];

export interface Address {
  room: Room;
  fields: URLSearchParams;
}

/** A field's value, several of them, or none where it is left out. */
export type Fields = Record<string, string | readonly string[] | undefined>;

const KEPT = ["on", "edit"];
/* What goes with one from room to room: the release that is looked at, and the draft. */

export const address = signal(parse(location.hash));

/** The channel or the release's number that rooms look at. */
export const on = computed(() => address.value.fields.get("on") || "live");

window.addEventListener("hashchange", () => {
  address.value = parse(location.hash);
});

/** A link to a room, for the `href` of an element. It keeps the release and the draft, unless `fields` has others. */
export function link(room: Room, fields: Fields = {}): string {
  const all = new URLSearchParams();
  const set = (name: string, values: readonly string[]) => values.forEach((value) => value && all.append(name, value));
  for (const name of KEPT) if (!(name in fields)) set(name, address.value.fields.getAll(name));
  for (const [name, value] of Object.entries(fields)) set(name, typeof value === "string" ? [value] : (value ?? []));
  const query = all.toString();
  return `#/${room}${query && `?${query}`}`;
}

export function go(room: Room, fields: Fields = {}): void {
  location.hash = link(room, fields);
}

/** Write what a room shows into its address, without a step in the history. */
export function note(fields: Fields): void {
  const now = address.value;
  const kept: Fields = {};
  for (const name of new Set(now.fields.keys())) kept[name] = now.fields.getAll(name);
  history.replaceState(null, "", link(now.room, { ...kept, ...fields }));
  address.value = parse(location.hash);
}

function parse(hash: string): Address {
  const [path = "", query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  const room = ROOMS.find((name) => name === path) ?? "write";
  return { room, fields: new URLSearchParams(query) };
}
