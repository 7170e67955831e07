/** Who is signed in: a key, kept in this tab's session and sent with each call; what it may do. */

import { signal } from "@preact/signals";
import { Code, connect, refusal, type Backpack } from "backpack-serving-client";
import type { GetModelResponse, Position } from "backpack-serving-client/backpack_proto/v1/inference";
import { secrets } from "./secrets";

export interface Session {
  backpack: Backpack;
  /** Empty for an operator's key, which is no tenant's. */
  tenant: string;
  /** Absent if the key may not ask, or no gateway answers. */
  model?: GetModelResponse;
  mayCall: boolean;
  mayAuthor: boolean;
  mayOperate: boolean;
}

const STORED = "backpack-key";

export const session = signal<Session | null>(null);

/** Where the store stood after the last write of this tab: later calls wait until they see it. */
export const since = signal<Position | undefined>(undefined);

/** Throws the refusal of a key that the server doesn't know. */
export async function signIn(key: string): Promise<void> {
  const found = await identify(connect({ url: location.origin, key }));
  sessionStorage.setItem(STORED, key);
  session.value = found;
}

export function signOut(): void {
  sessionStorage.removeItem(STORED);
  session.value = null;
  since.value = undefined;
  secrets.value = [];
}

/** The key of this tab's session, if there is one. */
export function storedKey(): string | null {
  return sessionStorage.getItem(STORED);
}

/** A key can't be asked what it may do; one call of each kind tells. */
async function identify(backpack: Backpack): Promise<Session> {
  const calls = await Promise.allSettled([
    backpack.inference.getModel({}),
    backpack.releases.listChannels({ pageSize: 1 }),
    backpack.patches.listPatches({ pageSize: 1 }),
    backpack.tenants.listTenants({ pageSize: 1 }),
  ]);
  const refused = calls.flatMap((call) => (call.status === "rejected" ? [call.reason] : []));
  const unknown = refused.find((error) => refusal(error).code === Code.Unauthenticated);
  if (unknown || refused.length === calls.length) throw unknown ?? refused[0];
  const [model, channels, patches, tenants] = calls;
  return {
    backpack,
    tenant: channels.status === "fulfilled" ? (channels.value.channels[0]?.name.split("/")[1] ?? "") : "",
    ...(model.status === "fulfilled" ? { model: model.value } : {}),
    mayCall: !denied(model),
    mayAuthor: !denied(patches),
    mayOperate: !denied(tenants),
  };
}

function denied(call: PromiseSettledResult<unknown>): boolean {
  return call.status === "rejected" && refusal(call.reason).code === Code.PermissionDenied;
}
