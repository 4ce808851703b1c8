/** What the machine does: asked for while its page is open, with the memory as the server sends it. */

import { api } from "../lib/api";
import type { Sample, System } from "../lib/types";
import { events } from "./events.svelte";
import { toasts } from "./toasts.svelte";

const MOST_SAMPLES = 900;

class Machine {
  system = $state.raw<System | null>(null);
  history = $state.raw<Sample[]>([]);

  constructor() {
    events.on("memory", (sample) => (this.history = [...this.history, sample].slice(-MOST_SAMPLES)));
    events.on("end", () => this.system && void this.load());
  }

  async load(): Promise<void> {
    try {
      this.system = await api.system();
      this.history = this.system.memory.history;
    } catch (error) {
      toasts.fail(error);
    }
  }
}

export const machine = new Machine();
