/** What the server's JSON holds. Times are seconds since 1970, sizes are bytes. */

export interface Memory {
  width: number;
  height: number;
  peak: number;
  free: number | null;
  fits: boolean;
  why_not: string | null;
}

export interface Model {
  name: string;
  encoding: string;
  default_size: [number, number];
  default_steps: number;
  payload: Record<string, number> & { total: number };
  memory: Memory;
  loaded: boolean;
  examples: string[];
}

/** Everything that decides the pictures of a job; `seed` is the first's. */
export interface Settings {
  prompt: string;
  model: string;
  width: number;
  height: number;
  steps: number;
  seed: number;
  num_images: number;
}

/** A picture in the gallery. */
export interface Picture {
  id: string;
  created: number;
  model: string;
  prompt: string;
  seed: number | null;
  width: number;
  height: number;
  steps: number;
  favourite: boolean;
  tags: string[];
  bytes: number;
  trashed: number | null;
  url: string;
  thumbnail_url: string;
}

export type Phase = "loading" | "encode" | "denoise" | "decode";

export interface Progress {
  phase: Phase;
  picture: number;
  pictures: number;
  step: number;
  steps: number;
  fraction: number;
  seconds_left: number | null;
}

export interface Job {
  id: string;
  state: "queued" | "running" | "done" | "failed" | "cancelled";
  cancelling: boolean;
  position: number | null;
  created: number;
  started: number | null;
  finished: number | null;
  model: string;
  prompt: string;
  width: number;
  height: number;
  steps: number;
  seeds: number[];
  progress: Progress | null;
  images: Picture[];
  warnings: string[];
  error: string | null;
}

/** The predicted clean picture after a step. */
export interface Preview {
  job: string;
  picture: number;
  step: number;
  steps: number;
  image: string;
}

export interface Recipe extends Record<string, unknown> {
  prompt: string;
  model: string;
  seed: number | null;
  width: number;
  height: number;
  steps: number;
}

export interface Sample {
  time: number;
  rss: number;
  available: number;
}

/** A name that the server's process looked up, or an address that it connected to. */
export interface NetworkCall {
  kind: "lookup" | "connection";
  host: string;
  port: number | null;
  count: number;
  first: number;
  last: number;
}

export interface System {
  version: string;
  state: "starting" | "ready";
  machine: { system: string; processor: string; architecture: string; usable_cores: number; cpu_features: string[];
    memory_bytes: number; python: string };
  devices: { device: string; state: string; loaded: string[] }[];
  libraries: Record<string, string>;
  threads: { count: number; reason: string } | null;
  decoder: { dtype: string; reason: string } | null;
  kernels: { model: string; component: string; kernel: string; reason: string }[];
  memory: { rss: number; available: number; total: number; history: Sample[] };
  network: { calls: NetworkCall[]; statement: string };
  gallery: { folder: string; images: number; bytes: number };
  idle_unload_seconds: number;
  limits: { prompt: number; num_images: number; steps: number; side: number; queue: number; upload: number };
}

export interface Link {
  lan: boolean;
  url: string | null;
  qr: string | null;
  hint?: string | null;
}
