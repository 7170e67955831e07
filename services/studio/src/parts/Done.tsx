import type { ComponentChildren } from "preact";
import { useEffect, useRef } from "preact/hooks";

/** What was done. It takes the focus, since what was pressed may be gone. */
export function Done({ children }: { children: ComponentChildren }) {
  const box = useRef<HTMLDivElement>(null);
  useEffect(() => box.current?.focus(), []);
  return (
    <div class="done" role="status" tabIndex={-1} ref={box}>
      {children}
    </div>
  );
}
