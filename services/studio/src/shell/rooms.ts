/** The rooms: what they are called, and what a key must be good for. */

import type { ComponentType } from "preact";
import type { Room } from "../address";
import { CompareRoom } from "../rooms/compare/CompareRoom";
import { EditRoom } from "../rooms/edit/EditRoom";
import { FleetRoom } from "../rooms/fleet/FleetRoom";
import { ReleaseRoom } from "../rooms/release/ReleaseRoom";
import { WordsRoom } from "../rooms/words/WordsRoom";
import { WriteRoom } from "../rooms/write/WriteRoom";
import type { Session } from "../session/session";

interface Described {
  title: string;
  Place: ComponentType;
  isOpen: (session: Session) => boolean;
  role: string;
}

export const DESCRIBED: Record<Room, Described> = {
  write: { title: "Write", Place: WriteRoom, isOpen: (key) => key.mayCall, role: "caller" },
  words: { title: "Words", Place: WordsRoom, isOpen: (key) => key.mayCall, role: "caller" },
  edit: { title: "Edit", Place: EditRoom, isOpen: (key) => key.mayCall && key.mayAuthor, role: "author, and caller," },
  compare: { title: "Compare", Place: CompareRoom, isOpen: (key) => key.mayCall, role: "caller" },
  release: { title: "Release", Place: ReleaseRoom, isOpen: (key) => key.mayAuthor, role: "author or releaser" },
  fleet: { title: "Fleet", Place: FleetRoom, isOpen: (key) => key.mayOperate, role: "admin" },
};
