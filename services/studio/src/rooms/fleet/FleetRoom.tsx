import { Heading } from "../../parts/Heading";
import { viewOf, Views } from "../../parts/Views";
import { Readers } from "./Readers";
import { Tenants } from "./Tenants";

const VIEWS = { tenants: "Tenants and keys", readers: "Gateways and replicas" };

export function FleetRoom() {
  return (
    <>
      <Heading title="Fleet">For operators: who may call, and whether every gateway and replica knows it.</Heading>
      <Views room="fleet" label="Fleet" views={VIEWS} />
      {viewOf(VIEWS) === "readers" ? <Readers /> : <Tenants />}
    </>
  );
}
