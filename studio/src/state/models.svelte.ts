/** The models of this machine, and the memory that each needs at the size in question. */

import { api } from "../lib/api";
import type { Model, System } from "../lib/types";
import { events } from "./events.svelte";
import { toasts } from "./toasts.svelte";

const LIMITS: System["limits"] = { prompt: 4000, num_images: 16, steps: 100, side: 4096, queue: 64, upload: 2 ** 26 };
const PAUSE_MS = 150;

class Models {
  list = $state<Model[]>([]);
  limits = $state(LIMITS);
  #asked = 0;
  #timer = 0;
  #size: [number, number] | null = null;

  constructor() {
    events.on("hello", () => void this.load());
    events.on("end", () => void this.load());
  }

  find(name: string): Model | undefined {
    return this.list.find((model) => model.name === name);
  }

  examples(name: string): string[] {
    return (this.find(name) ?? this.list[0])?.examples ?? [];
  }

  /** Predict the memory at another size, once it stays the same for a moment. */
  sized(width: number, height: number): void {
    if (this.#size?.[0] === width && this.#size[1] === height) return;
    this.#size = [width, height];
    clearTimeout(this.#timer);
    this.#timer = window.setTimeout(() => void this.load(), PAUSE_MS);
  }

  async load(): Promise<void> {
    const asked = ++this.#asked;
    try {
      const { models } = await api.models(...(this.#size ?? []));
      if (asked === this.#asked) this.list = models;
    } catch (error) {
      toasts.fail(error);
    }
  }
}

export const models = new Models();
