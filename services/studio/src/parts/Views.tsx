import { address, link, type Room } from "../address";

interface Props {
  room: Room;
  label: string;
  /** The value of the field `view`, and what people read. The first one needs no field. */
  views: Record<string, string>;
}

/** What a room has several of, as links. */
export function Views({ room, label, views }: Props) {
  const now = viewOf(views);
  return (
    <nav class="views" aria-label={label}>
      {Object.entries(views).map(([view, title], at) => (
        <a key={view} href={link(room, at ? { view } : {})} aria-current={view === now ? "page" : undefined}>
          {title}
        </a>
      ))}
    </nav>
  );
}

export function viewOf(views: Record<string, string>): string {
  const named = address.value.fields.get("view") ?? "";
  return named in views ? named : Object.keys(views)[0]!;
}
