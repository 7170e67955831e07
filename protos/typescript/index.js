// A client of a Backpack Serving server over HTTP: every service that clients call, typed by the protos.
import { Code, ConnectError, createClient, } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-web";
import { InferenceService } from "./backpack_proto/v1/inference_pb.js";
import { AuditService, PatchService, ReleaseService, TenantService, } from "./backpack_proto/v1/interventions_pb.js";
import { FleetService } from "./backpack_proto/v1/sync_pb.js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema, } from "./google/rpc/error_details_pb.js";
/** Calls nobody before a method is called. */
export function connect({ url, key, fetch }) {
    const authorize = (next) => (request) => {
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
/** What an error of a call says. Any other error is a refusal without a reason. */
export function refusal(error) {
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
export { create, fromJson, toJson, } from "@bufbuild/protobuf";
export { Code, ConnectError };
