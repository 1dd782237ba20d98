// The server's activity, as it happens.

import { getJson, stream } from "./api.js";

const INTERVAL = 2; // seconds between two messages of the stream, however much happens
const PAUSE = 2000; // milliseconds before the stream is asked for again

/**
 * Follows the activity until the signal aborts.
 * @param {AbortSignal} signal
 * @param {object} listeners Functions by event name: request, instances, death, replay; known(requests) as the
 * stream begins; and state(text).
 */
export async function follow(signal, listeners) {
  while (!signal.aborted) {
    try {
      listeners.known((await getJson("v1/activity?limit=50", { signal })).requests.reverse());
      const events = stream(`v1/activity/events?interval=${INTERVAL}`, { signal });
      listeners.state("");
      for await (const { name, data } of events) if (data) listeners[name]?.(JSON.parse(data));
      if (!signal.aborted) listeners.state("The server has ended the stream.");
    } catch (error) {
      if (!signal.aborted) listeners.state(error.message);
    }
    await new Promise((resolve) => setTimeout(resolve, PAUSE));
  }
}

/** The memory of each device in bytes, {device: {reserved, used, free}}, from the server's metrics. */
export function memoryOf(metrics) {
  const devices = {};
  for (const [, device, kind, value] of metrics.matchAll(/^exo:memory_bytes\{device="([^"]*)",kind="([^"]*)"\} (\S+)$/gm)) {
    (devices[device] ??= {})[kind] = Number(value);
  }
  return devices;
}
