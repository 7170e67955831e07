/** Light, dark, or as the system has it. */

import { signal } from "@preact/signals";

export const THEMES = ["system", "light", "dark"] as const;
export type Theme = (typeof THEMES)[number];

const STORED = "backpack-theme";

export const theme = signal<Theme>(THEMES.find((name) => name === localStorage.getItem(STORED)) ?? "system");

export function applyTheme(): void {
  if (theme.value === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme.value;
}

export function choose(chosen: Theme): void {
  theme.value = chosen;
  localStorage.setItem(STORED, chosen);
  applyTheme();
}
