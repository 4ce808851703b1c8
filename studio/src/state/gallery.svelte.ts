/** The pictures that were drawn: a page of those that are searched for, and what was changed about any of them. */

import { api, ApiError } from "../lib/api";
import { saveBlob } from "../lib/browser";
import { plural } from "../lib/format";
import type { Picture } from "../lib/types";
import { events } from "./events.svelte";
import { toasts } from "./toasts.svelte";

const PAUSE_MS = 200;

class Gallery {
  query = $state("");
  onlyFavourites = $state(false);
  onlyTag = $state("");
  /** Whether deleted pictures are shown, which can be brought back. */
  trash = $state(false);
  list = $state<Picture[]>([]);
  total = $state<number | null>(null);
  tags = $state<string[]>([]);
  busy = $state(false);
  /** The newest state of pictures that were changed here or elsewhere. */
  #changed = $state<Record<string, Picture>>({});
  #next: string | null = null;
  #asked = 0;
  #timer = 0;
  #opened = false;

  filtered = $derived(this.query.trim() !== "" || this.onlyFavourites || this.onlyTag !== "" || this.trash);

  constructor() {
    events.on("image", () => this.#opened && this.#soon());
    events.on("gallery", ({ changed }) => void this.#refresh(changed));
  }

  /** `picture` as it is now. */
  now(picture: Picture): Picture {
    return this.#changed[picture.id] ?? picture;
  }

  searchSoon(): void {
    this.#soon();
  }

  filter(change: { query?: string; onlyFavourites?: boolean; onlyTag?: string; trash?: boolean }): void {
    Object.assign(this, change);
    void this.load();
  }

  async load(): Promise<void> {
    this.#opened = true;
    clearTimeout(this.#timer);
    const asked = ++this.#asked;
    this.busy = true;
    try {
      const [page, { tags }] = await Promise.all([api.pictures(this.#search()), api.tags()]);
      if (asked !== this.#asked) return;
      this.list = page.images;
      this.total = page.total;
      this.#next = page.next;
      this.tags = tags.map((each) => each.tag);
    } catch (error) {
      toasts.fail(error);
    }
    if (asked === this.#asked) this.busy = false;
  }

  async more(): Promise<void> {
    if (!this.#next || this.busy) return;
    const asked = this.#asked;
    this.busy = true;
    try {
      const page = await api.pictures(this.#search(this.#next));
      if (asked === this.#asked) {
        this.list.push(...page.images);
        this.#next = page.next;
      }
    } catch (error) {
      toasts.fail(error);
    }
    this.busy = false;
  }

  async favourite(picture: Picture): Promise<void> {
    await this.#change(picture, { favourite: !this.now(picture).favourite });
  }

  async tag(picture: Picture, tags: string[]): Promise<void> {
    await this.#change(picture, { tags });
    this.tags = [...new Set([...this.tags, ...tags])];
  }

  async remove(ids: readonly string[]): Promise<void> {
    try {
      const { images } = await api.trash(ids);
      this.#take(images);
      this.#leave(ids);
      toasts.say(`${plural(ids.length, "picture")} deleted.`, { label: "Undo", run: () => void this.restore(ids) });
    } catch (error) {
      toasts.fail(error);
    }
  }

  async exportZip(ids: readonly string[]): Promise<void> {
    try {
      saveBlob(await api.exported(ids), "linocut-pictures.zip");
    } catch (error) {
      toasts.fail(error);
    }
  }

  /** Destroy deleted pictures. There is no way back, so whoever calls this has asked first. */
  async purge(ids: readonly string[]): Promise<void> {
    try {
      await api.purge(ids);
      this.#leave(ids);
      toasts.say(`${plural(ids.length, "picture")} destroyed.`);
    } catch (error) {
      toasts.fail(error);
    }
  }

  async restore(ids: readonly string[]): Promise<void> {
    try {
      this.#take((await api.restore(ids)).images);
      if (this.#opened) await this.load();
      if (this.trash) toasts.say(`${plural(ids.length, "picture")} restored.`);
    } catch (error) {
      toasts.fail(error);
    }
  }

  async #change(picture: Picture, change: { favourite?: boolean; tags?: string[] }): Promise<void> {
    try {
      this.#take([await api.change(picture.id, change)]);
    } catch (error) {
      toasts.fail(error);
    }
  }

  #take(pictures: readonly Picture[]): void {
    for (const picture of pictures) this.#changed[picture.id] = picture;
  }

  async #refresh(ids: readonly string[]): Promise<void> {
    const known = ids.filter((id) => this.#changed[id] || this.list.some((each) => each.id === id));
    const fresh = await Promise.allSettled(known.map((id) => api.picture(id)));
    this.#take(fresh.flatMap((each) => (each.status === "fulfilled" ? [each.value] : [])));
    const gone = known.filter((_, index) => {
      const each = fresh[index];
      return each?.status === "rejected" && each.reason instanceof ApiError && each.reason.status === 404;
    });
    this.#leave([...gone, ...this.list.filter((each) => Boolean(this.now(each).trashed) !== this.trash).map((each) => each.id)]);
  }

  #leave(ids: readonly string[]): void {
    const before = this.list.length;
    this.list = this.list.filter((each) => !ids.includes(each.id));
    if (this.total !== null) this.total -= before - this.list.length;
  }

  #soon(): void {
    clearTimeout(this.#timer);
    this.#timer = window.setTimeout(() => void this.load(), PAUSE_MS);
  }

  #search(after?: string): URLSearchParams {
    const search = new URLSearchParams();
    if (this.query.trim()) search.set("query", this.query.trim());
    if (this.onlyFavourites) search.set("favourite", "true");
    if (this.onlyTag) search.set("tag", this.onlyTag);
    if (this.trash) search.set("trashed", "true");
    if (after) search.set("after", after);
    return search;
  }
}

export const gallery = new Gallery();
