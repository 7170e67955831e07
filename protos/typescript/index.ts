// A client of a Backpack Serving server over HTTP: every service that clients call, typed by the protos.

import {
  type Client,
  Code,
  ConnectError,
  createClient,
  type Interceptor,
} from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-web";
import { InferenceService } from "./backpack_proto/v1/inference_pb.js";
import {
  AuditService,
  PatchService,
  ReleaseService,
  TenantService,
} from "./backpack_proto/v1/interventions_pb.js";
import { FleetService } from "./backpack_proto/v1/sync_pb.js";
import {
  BadRequestSchema,
  ErrorInfoSchema,
  RetryInfoSchema,
} from "./google/rpc/error_details_pb.js";

export interface Options {
  /** Where `backpack serve http` listens, such as http://127.0.0.1:8480. */
  url: string;
  /** An API key, or a token of an issuer that the server trusts. */
  key: string;
  /** In place of the platform's. */
  fetch?: typeof globalThis.fetch;
}

/** The services of a server. Methods take plain objects with the protos' fields in camelCase, and an AbortSignal. */
export interface Backpack {
  inference: Client<typeof InferenceService>;
  patches: Client<typeof PatchService>;
  releases: Client<typeof ReleaseService>;
  audit: Client<typeof AuditService>;
  fleet: Client<typeof FleetService>;
  tenants: Client<typeof TenantService>;
}

/** Calls nobody before a method is called. */
export function connect({ url, key, fetch }: Options): Backpack {
  const authorize: Interceptor = (next) => (request) => {
    request.header.set("authorization", `Bearer ${key}`);
    return next(request);
  };
  const transport = createConnectTransport({
    baseUrl: url,
    useBinaryFormat: true,
    interceptors: [authorize],
    ...(fetch ? { fetch } : {}),
  });
  return {
    inference: createClient(InferenceService, transport),
    patches: createClient(PatchService, transport),
    releases: createClient(ReleaseService, transport),
    audit: createClient(AuditService, transport),
    fleet: createClient(FleetService, transport),
    tenants: createClient(TenantService, transport),
  };
}

/** Why a call was refused. */
export interface Refusal {
  code: Code;
  /** A stable word for programs, such as NO_SUCH_WORD; empty if the server didn't answer. */
  reason: string;
  message: string;
  /** The fields that are wrong. */
  fields: string[];
  /** Seconds after which the same call may pass, if the server says so. */
  retryAfter?: number;
}

/** What an error of a call says. Any other error is a refusal without a reason. */
export function refusal(error: unknown): Refusal {
  const from = ConnectError.from(error);
  const retry = from.findDetails(RetryInfoSchema)[0]?.retryDelay;
  return {
    code: from.code,
    reason: from.findDetails(ErrorInfoSchema)[0]?.reason ?? "",
    message: from.rawMessage,
    fields: from
      .findDetails(BadRequestSchema)
      .flatMap((bad) => bad.fieldViolations.map((field) => field.field)),
    ...(retry ? { retryAfter: Number(retry.seconds) + retry.nanos / 1e9 } : {}),
  };
}

export {
  create,
  fromJson,
  toJson,
  type MessageInitShape,
} from "@bufbuild/protobuf";
export type { Timestamp } from "@bufbuild/protobuf/wkt";
export { Code, ConnectError };
