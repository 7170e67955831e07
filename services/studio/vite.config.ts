import { createHash } from "node:crypto";
import { readdirSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { defineConfig, type Plugin } from "vite";

const server = process.env.BACKPACK_HTTP ?? "http://127.0.0.1:8480";

/** What the built files are made of. A test compares it with their digest, where there is no npm to build them anew. */
const SOURCES = [
  "index.html",
  "package-lock.json",
  "src",
  "tsconfig.json",
  "vite.config.ts",
  "../../protos/typescript/backpack_proto",
  "../../protos/typescript/google",
  "../../protos/typescript/index.js",
];

function files(path: string): string[] {
  if (!statSync(path).isDirectory()) return [path];
  return readdirSync(path).flatMap((name) => files(join(path, name)));
}

/** Writes BUILT-FROM, the SHA-256 of the sources: of each path's name, a zero byte, and its content, sorted by name. */
function builtFrom(): Plugin {
  return {
    name: "built-from",
    generateBundle() {
      const digest = createHash("sha256");
      for (const file of SOURCES.flatMap(files).sort()) digest.update(`${file}\0`).update(readFileSync(file));
      this.emitFile({ type: "asset", fileName: "BUILT-FROM", source: `${digest.digest("hex")}\n` });
    },
  };
}

/** Writes LICENSES, those of the packages that are in the script. */
function licenses(): Plugin {
  return {
    name: "licenses",
    generateBundle() {
      const folders = new Set<string>();
      for (const module of this.getModuleIds()) {
        const found = /^\0?(.*\/node_modules\/(?:@[^/]+\/)?[^/]+)\//.exec(module);
        if (found?.[1]) folders.add(found[1]);
      }
      const texts = [...folders].map((folder) => {
        const { name, version, license } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
        const file = readdirSync(folder).find((entry) => /^licen[sc]e/i.test(entry));
        return `${name} ${version}, ${license}\n\n${file ? readFileSync(join(folder, file), "utf8").trim() : ""}`.trim();
      });
      this.emitFile({ type: "asset", fileName: "LICENSES", source: `${texts.sort().join("\n\n\n")}\n` });
    },
  };
}

export default defineConfig({
  plugins: [builtFrom(), licenses()],
  build: {
    outDir: "../backpack_serving/http/studio",
    emptyOutDir: true,
    target: "es2023",
    assetsInlineLimit: 0, // the content security policy lets no data: through
    modulePreload: { polyfill: false },
  },
  server: { proxy: { "/backpack.v1": server } },
});
