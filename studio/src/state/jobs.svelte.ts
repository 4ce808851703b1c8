/** What is being drawn, waits, or was drawn lately, as the server tells it. */

import { api } from "../lib/api";
import type { Job, Picture, Preview, Settings } from "../lib/types";
import { events } from "./events.svelte";
import { toasts } from "./toasts.svelte";

const OVER: ReadonlySet<Job["state"]> = new Set(["done", "failed", "cancelled"]);
/** Jobs go forward through these. */
const STAGE: Readonly<Record<Job["state"], number>> = { queued: 0, running: 1, done: 2, failed: 2, cancelled: 2 };

class Jobs {
  list = $state<Job[]>([]);
  /** What waits, in the server's order. A job's own `position` is that of the moment at which it was told. */
  #order = $state.raw<readonly string[]>([]);
  #previews = $state<Record<string, Preview[]>>({});
  #waiting = new Map<string, (job: Job) => void>();

  running = $derived(this.list.find((job) => job.state === "running"));
  queued = $derived(this.list.filter((job) => job.state === "queued").sort((a, b) => this.#place(a) - this.#place(b)));
  active = $derived([...(this.running ? [this.running] : []), ...this.queued]);
  /** What is being drawn, else what comes next, else what was drawn last. */
  shown = $derived(this.active[0] ?? this.list.filter((job) => job.state !== "cancelled" || job.images.length).reduce<Job | undefined>(
    (last, job) => (last && (last.finished ?? 0) >= (job.finished ?? 0) ? last : job), undefined));

  constructor() {
    events.on("hello", () => void this.#load());
    events.on("job", (job) => this.#put(job));
    events.on("end", (job) => this.#put(job));
    events.on("queue", ({ order }) => (this.#order = order));
    events.on("progress", ({ job: id, ...progress }) => {
      const job = this.list.find((each) => each.id === id);
      if (job) job.progress = progress;
    });
    events.on("image", ({ job: id, image }) => {
      const job = this.list.find((each) => each.id === id);
      if (job && !job.images.some((each) => each.id === image.id)) job.images.push(image);
    });
    events.on("preview", (preview) => {
      this.#previews[preview.job] = [...(this.#previews[preview.job] ?? []), preview];
    });
  }

  /** Previews of the picture that is being drawn, or was last. */
  previews(job: Job): Preview[] {
    const all = this.#previews[job.id] ?? [];
    return all.filter((preview) => preview.picture === all.at(-1)?.picture);
  }

  async start(settings: Settings): Promise<Job | null> {
    try {
      const job = await api.start(settings);
      this.#put(job);
      return job;
    } catch (error) {
      toasts.fail(error);
      return null;
    }
  }

  /** Draw one picture and wait for it; `signal` cancels. Throws if it is cancelled or fails. */
  async picture(settings: Settings, signal: AbortSignal): Promise<Picture> {
    const started = await api.start(settings);
    this.#put(started);
    signal.addEventListener("abort", () => void this.cancel(started.id), { once: true });
    if (signal.aborted) await this.cancel(started.id);
    const over = OVER.has(started.state) ? started : await new Promise<Job>((done) => this.#waiting.set(started.id, done));
    const picture = over.images[0];
    if (over.state !== "done" || !picture) throw new Error(over.error ?? "The drawing was cancelled.");
    return picture;
  }

  async cancel(id: string): Promise<void> {
    await api.cancel(id).then((job) => this.#put(job), (error) => toasts.fail(error));
  }

  async move(id: string, position: number): Promise<void> {
    await api.move(id, position).then((job) => this.#put(job), (error) => toasts.fail(error));
  }

  async #load(): Promise<void> {
    try {
      const { jobs } = await api.jobs();
      this.list = jobs;
      this.#order = jobs.filter((job) => job.state === "queued").map((job) => job.id);
      jobs.forEach((job) => this.#settle(job));
    } catch (error) {
      toasts.fail(error);
    }
  }

  #place(job: Job): number {
    const place = this.#order.indexOf(job.id);
    return place < 0 ? this.#order.length : place;
  }

  /** An answer to a request may come after the events that followed it: what is drawn already waits no more. */
  #put(job: Job): void {
    const place = this.list.findIndex((each) => each.id === job.id);
    const known = this.list[place];
    if (!known) this.list.unshift(job);
    else if (STAGE[job.state] >= STAGE[known.state]) this.list[place] = job;
    this.#settle(job);
  }

  #settle(job: Job): void {
    if (!OVER.has(job.state)) return;
    this.#waiting.get(job.id)?.(job);
    this.#waiting.delete(job.id);
    if (!this.#previews[job.id]) return;
    // Only those of the last job are still looked at.
    const wanted = new Set([job.id, ...this.active.map((each) => each.id)]);
    for (const id of Object.keys(this.#previews)) if (!wanted.has(id)) delete this.#previews[id];
  }
}

export const jobs = new Jobs();
