/** The one stream of events that feeds all screens: browsers allow few connections to a server, so there is no other. */

import { api } from "../lib/api";
import type { Job, Picture, Preview, Progress, Sample } from "../lib/types";

export interface Events {
  hello: { version: string };
  job: Job;
  queue: { order: string[] };
  progress: Progress & { job: string };
  preview: Preview;
  image: { job: string; picture: number; image: Picture };
  end: Job;
  gallery: { changed: string[] };
  memory: Sample;
}

const RETRY_MS = 2000;

class EventStream {
  connected = $state(true);
  #source: EventSource | null = null;
  #handlers: { [Name in keyof Events]?: ((data: Events[Name]) => void)[] } = {};

  on<Name extends keyof Events>(name: Name, handler: (data: Events[Name]) => void): void {
    ((this.#handlers[name] ??= []) as ((data: Events[Name]) => void)[]).push(handler);
  }

  open(): void {
    this.#source?.close();
    const source = new EventSource("/api/events");
    this.#source = source;
    source.onopen = () => (this.connected = true);
    source.onerror = () => {
      this.connected = false;
      // The browser tries again by itself, unless the server refused; only a plain request tells that it wants a token.
      if (source.readyState !== EventSource.CLOSED) return;
      void api.jobs().catch(() => {});
      setTimeout(() => this.#source === source && this.open(), RETRY_MS);
    };
    for (const name of ["hello", "job", "queue", "progress", "preview", "image", "end", "gallery", "memory"] as const) {
      source.addEventListener(name, (event) => this.#tell(name, JSON.parse(event.data)));
    }
  }

  #tell<Name extends keyof Events>(name: Name, data: Events[Name]): void {
    this.#handlers[name]?.forEach((handler) => handler(data));
  }
}

export const events = new EventStream();
