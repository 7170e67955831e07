import type { ComponentChildren } from "preact";
import { useEffect, useRef } from "preact/hooks";

let arrived = false;
/* Whether a room was shown before: at first the focus is the page's, and the first Tab comes to the skip link. */

/** A room's title. It takes the focus when one comes from another room, so that a screen reader reads it. */
export function Heading({ title, children }: { title: string; children: ComponentChildren }) {
  const heading = useRef<HTMLHeadingElement>(null);
  useEffect(() => {
    document.title = `${title} · Backpack studio`;
    if (arrived) heading.current?.focus({ preventScroll: true });
    arrived = true;
  }, []);
  return (
    <header class="heading">
      <h1 ref={heading} tabIndex={-1}>
        {title}
      </h1>
      <p>{children}</p>
    </header>
  );
}
