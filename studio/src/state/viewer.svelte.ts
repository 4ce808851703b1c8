/** The picture that is looked at, and those around it. */

import { api } from "../lib/api";
import type { Picture, Recipe } from "../lib/types";
import { gallery } from "./gallery.svelte";
import { toasts } from "./toasts.svelte";

class Viewer {
  id = $state<string | null>(null);
  among = $state.raw<readonly Picture[]>([]);
  recipe = $state.raw<Recipe | null>(null);

  place = $derived(this.among.findIndex((each) => each.id === this.id));
  picture = $derived.by(() => {
    const picture = this.among[this.place];
    return picture && gallery.now(picture);
  });

  open(id: string, among: readonly Picture[]): void {
    this.among = [...among];
    this.#show(id);
  }

  turn(by: number): void {
    const next = this.among[this.place + by];
    if (next) this.#show(next.id);
  }

  close(): void {
    this.id = null;
  }

  #show(id: string): void {
    this.id = id;
    this.recipe = null;
    api.picture(id).then(({ recipe }) => this.id === id && (this.recipe = recipe), (error) => toasts.fail(error));
  }
}

export const viewer = new Viewer();
