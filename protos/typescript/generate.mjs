// Compiles the .proto files into this folder: `npm run generate`. PYTHON names a Python that has grpcio-tools.
import { execFileSync } from "node:child_process";
import { readdirSync, rmSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const root = dirname(here); // protos/
const out = process.argv[2] ?? here;
const python = process.env.PYTHON ?? "python3";
const packages = (name) =>
  execFileSync(python, [
    "-c",
    `import ${name} as m; print(list(m.__path__)[0])`,
  ])
    .toString()
    .trim();

for (const folder of ["backpack_proto", "google"])
  rmSync(join(out, folder), { recursive: true, force: true });
const protos = readdirSync(join(root, "backpack_proto/v1"))
  .filter((name) => name.endsWith(".proto"))
  .map((name) => `backpack_proto/v1/${name}`)
  .sort();
execFileSync(
  python,
  [
    "-m",
    "grpc_tools.protoc",
    `--plugin=protoc-gen-es=${join(here, "node_modules/.bin/protoc-gen-es")}`,
    `--es_out=${out}`,
    "--es_opt=target=js+dts",
    "--es_opt=import_extension=js",
    `-I${root}`,
    `-I${join(packages("grpc_tools"), "_proto")}`,
    `-I${dirname(dirname(packages("google.rpc")))}`,
    ...protos,
    "google/rpc/error_details.proto",
  ],
  { stdio: "inherit" },
);
