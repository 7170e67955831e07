import { Heading } from "../../parts/Heading";
import { viewOf, Views } from "../../parts/Views";
import { NewKeys } from "./NewKeys";
import { Readers } from "./Readers";
import { Replicas } from "./Replicas";
import { Tenants } from "./Tenants";

const VIEWS = { tenants: "Tenants and keys", replicas: "Replicas and load", readers: "Who follows the store" };
const PLACES = { tenants: Tenants, replicas: Replicas, readers: Readers };

export function FleetRoom() {
  const Place = PLACES[viewOf(VIEWS) as keyof typeof PLACES];
  return (
    <>
      <Heading title="Fleet">
        For operators: who may call, how loaded replicas are, and whether every gateway and replica knows the store.
      </Heading>
      <NewKeys />
      <Views room="fleet" label="Fleet" views={VIEWS} />
      <Place />
    </>
  );
}
