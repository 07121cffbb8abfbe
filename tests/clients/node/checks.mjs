// Runs a client's checks one after the other. The last line that it prints is JSON for the runner.

import { readFileSync } from "node:fs";
import { join } from "node:path";

export const URL = process.env.CLIENTS_URL; // http://host:port of the pool
export const CHAT = process.env.CLIENTS_CHAT; // the model that chats and calls tools
export const ENCODER = process.env.CLIENTS_ENCODER; // the model that makes vectors

export async function run(name, checks) {
  let failed = 0;
  for (const [words, check] of Object.entries(checks)) {
    const began = performance.now();
    let word = "ok";
    try {
      await check();
    } catch (error) {
      failed += 1;
      word = "FAIL";
      console.log(error);
    }
    console.log(`${word} ${words} ${((performance.now() - began) / 1000).toFixed(1)} s`);
  }
  const { version } = JSON.parse(readFileSync(join(import.meta.dirname, "node_modules", name, "package.json"), "utf8"));
  console.log(JSON.stringify({ version, passed: Object.keys(checks).length - failed, failed }));
  process.exit(failed ? 1 : 0);
}

// The cosine of two vectors of length 1.
export function alike(one, other) {
  return one.reduce((sum, value, at) => sum + value * other[at], 0);
}
