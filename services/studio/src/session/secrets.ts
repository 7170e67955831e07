/** Secrets of keys that were made in this tab: the service says each once, so they stay until somebody puts them away. */

import { signal } from "@preact/signals";

export interface Secret {
  tenant: string;
  secret: string;
}

export const secrets = signal<readonly Secret[]>([]);

export function keep(made: Secret): void {
  secrets.value = [...secrets.value, made];
}

export function putAway(kept: Secret): void {
  secrets.value = secrets.value.filter((one) => one !== kept);
}
