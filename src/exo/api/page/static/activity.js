// The server's activity, as it happens.

import { getJson, stream } from "./api.js";

const PAUSE = 2000; // milliseconds before the stream is asked for again

/**
 * Follows the activity until the signal aborts.
 * @param {AbortSignal} signal
 * @param {object} listeners Functions by event name: request, instances, death, replay, and state(text).
 */
export async function follow(signal, listeners) {
  while (!signal.aborted) {
    try {
      for (const request of (await getJson("v1/activity?limit=50", { signal })).requests.reverse()) listeners.request(request);
      const events = stream("v1/activity/events", { signal });
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
