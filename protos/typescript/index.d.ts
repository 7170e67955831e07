import { type Client, Code, ConnectError } from "@connectrpc/connect";
import { InferenceService } from "./backpack_proto/v1/inference_pb.js";
import { AuditService, PatchService, ReleaseService, TenantService } from "./backpack_proto/v1/interventions_pb.js";
import { FleetService } from "./backpack_proto/v1/sync_pb.js";
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
export declare function connect({ url, key, fetch }: Options): Backpack;
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
export declare function refusal(error: unknown): Refusal;
export { create, fromJson, toJson, type MessageInitShape, } from "@bufbuild/protobuf";
export type { Timestamp } from "@bufbuild/protobuf/wkt";
export { Code, ConnectError };
