/** Arrow keys, Home and End among the elements of one thing, so that Tab passes it in one step. */

const STEPS: Record<string, number> = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

/** For `onKeyDown` of what holds them. They have `tabIndex` −1, but for the one that Tab comes to. */
export function arrows(event: KeyboardEvent): void {
  const all = [...(event.currentTarget as HTMLElement).querySelectorAll<HTMLElement>("a, button")];
  const from = all.indexOf(event.target as HTMLElement);
  const to = event.key === "Home" ? 0 : event.key === "End" ? all.length - 1 : from + (STEPS[event.key] ?? NaN);
  const next = all[to];
  if (!next) return;
  event.preventDefault();
  next.focus();
}
