/** What is the same in recipes of all rooms: the tenant, the release, the draft. */

import { on } from "../address";
import { draft, readableEdits } from "../draft/draft";
import { pythonEdits } from "../draft/python";
import { isNumber } from "../session/request";
import { session } from "../session/session";
import { literal, quoted } from "./words";

/** ` --channel live --as harbour`, after a command. */
export function commandWhere(): string {
  return `${isNumber(on.value) ? ` --release ${on.value}` : ` --channel ${quoted(on.value)}`}${asTenant()}`;
}

export function asTenant(): string {
  return ` --as ${session.value!.tenant}`;
}

export function commandEdits(): string {
  return draft.value.map((line) => ` --edit ${quoted(line)}`).join("");
}

/** `, channel="live"`, after arguments; with the draft, if there is one. */
export function pythonWhere(): string {
  const where = isNumber(on.value) ? `, release=${on.value}` : `, channel=${literal(on.value)}`;
  return draft.value.length ? `${where}, ${DRAFTED}` : where;
}

const DRAFTED = "draft=draft";

/** A program that uses one client of the gateway. It makes the draft, if its lines need it. */
export function withClient(names: string, ...lines: string[]): string[] {
  const edits = pythonEdits(readableEdits());
  const drafted = lines.some((line) => line.includes(DRAFTED));
  const imported = drafted ? [...new Set([...names.split(", "), ...edits.names])].sort().join(", ") : names;
  return [
    `from backpack_serving.client import ${imported}`,
    "",
    ...(drafted ? [`draft = ${edits.list}`] : []),
    `with Client("127.0.0.1:8470", open("var/${session.value!.tenant}.key").read().strip()) as client:`,
    ...lines.map((line) => `    ${line}`),
  ];
}

/** A program that uses one client of the intervention service. */
export function withSteering(names: string, ...lines: string[]): string[] {
  return [
    `from backpack_serving.client import ${names}`,
    "",
    `with Steering("127.0.0.1:8471", open("var/${session.value!.tenant}.key").read().strip()) as steering:`,
    ...lines.map((line) => `    ${line}`),
  ];
}
