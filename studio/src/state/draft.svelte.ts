/** The settings that the next picture will be drawn with. They survive a reload. */

import { keep, recall } from "../lib/browser";
import type { Model, Picture, Recipe, Settings } from "../lib/types";
import { models } from "./models.svelte";

const MOST_PROMPTS = 50;

export function randomSeed(): number {
  return crypto.getRandomValues(new Uint32Array(1))[0] ?? 0;
}

class Draft {
  prompt = $state("");
  model = $state("");
  width = $state(0);
  height = $state(0);
  steps = $state(0);
  seed = $state(randomSeed());
  locked = $state(false);
  count = $state(1);
  /** Prompts that were drawn, the last one first. */
  history = $state<string[]>([]);

  constructor() {
    Object.assign(this, recall<Partial<Draft>>("draft", {}));
    this.history = recall<string[]>("prompts", []);
  }

  save(): void {
    const { prompt, model, width, height, steps, seed, locked, count } = this;
    keep("draft", { prompt, model, width, height, steps, seed, locked, count });
  }

  /** Take the model with its own steps; and its size, unless another one than the last model's was chosen. */
  choose(model: Model): void {
    const before = models.find(this.model);
    const own = before && this.width === before.default_size[0] && this.height === before.default_size[1];
    if (own || !this.width || !this.height) [this.width, this.height] = model.default_size;
    if (this.model !== model.name || !this.steps) this.steps = model.default_steps;
    this.model = model.name;
  }

  /** Settings of a picture or of a recipe; its seed is locked, so that the same picture comes out. */
  reuse(from: Picture | Recipe): void {
    this.prompt = from.prompt;
    if (models.find(from.model)) this.model = from.model;
    this.width = from.width;
    this.height = from.height;
    this.steps = from.steps;
    this.count = 1;
    if (typeof from.seed === "number" && from.seed <= Number.MAX_SAFE_INTEGER) {
      this.seed = from.seed;
      this.locked = true;
    }
  }

  /** Roll a seed and keep it. */
  roll(): void {
    this.seed = randomSeed();
    this.locked = true;
  }

  /** The settings to draw with. A seed that is not locked is rolled first, so that locking it afterwards keeps it. */
  take(): Settings {
    if (!this.locked) this.seed = randomSeed();
    const { model, width, height, steps, seed, count } = this;
    const prompt = this.prompt.trim();
    this.history = [prompt, ...this.history.filter((each) => each !== prompt)].slice(0, MOST_PROMPTS);
    keep("prompts", this.history);
    return { prompt, model, width, height, steps, seed, num_images: count };
  }

  forget(): void {
    this.history = [];
    keep("prompts", []);
  }
}

export const draft = new Draft();
