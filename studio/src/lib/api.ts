/** The server's routes, one function each. A refusal becomes an ApiError whose message is the server's sentence. */

import type { Job, Link, Model, Picture, Recipe, Settings, System } from "./types";

export class ApiError extends Error {
  constructor(message: string, readonly status: number, readonly code: string | null) {
    super(message);
  }
}

/** Called when the server asks for a token. */
export const access: { wanted: () => void } = { wanted: () => {} };

async function send(method: string, path: string, body?: unknown): Promise<Response> {
  const raw = body instanceof Blob;
  let answer: Response;
  try {
    answer = await fetch(path, {
      method,
      headers: body === undefined ? {} : { "Content-Type": raw ? "image/png" : "application/json" },
      body: body === undefined ? null : raw ? body : JSON.stringify(body),
    });
  } catch {
    throw new ApiError("linocut does not answer. Is `linocut serve` still running?", 0, null);
  }
  if (answer.ok) return answer;
  if (answer.status === 401 && path !== "/api/login") access.wanted();
  const error = await answer.json().then((json) => json.error, () => null);
  throw new ApiError(error?.message ?? `The server answered ${answer.status} ${answer.statusText}.`, answer.status, error?.code ?? null);
}

async function ask<T>(method: string, path: string, body?: unknown): Promise<T> {
  return (await send(method, path, body)).json();
}

export interface Page {
  images: Picture[];
  next: string | null;
  total: number;
}

const of = (id: string): string => encodeURIComponent(id);

export const api = {
  login: (token: string) => send("POST", "/api/login", { token }),
  models: (width?: number, height?: number) =>
    ask<{ models: Model[] }>("GET", width && height ? `/api/models?width=${width}&height=${height}` : "/api/models"),
  system: () => ask<System>("GET", "/api/system"),
  link: () => ask<Link>("GET", "/api/link"),

  jobs: () => ask<{ jobs: Job[] }>("GET", "/api/jobs"),
  start: (settings: Settings) => ask<Job>("POST", "/api/jobs", settings),
  cancel: (id: string) => ask<Job>("DELETE", `/api/jobs/${of(id)}`),
  move: (id: string, position: number) => ask<Job>("PATCH", `/api/jobs/${of(id)}`, { position }),

  pictures: (query: URLSearchParams) => ask<Page>("GET", `/api/images?${query}`),
  picture: (id: string) => ask<Picture & { recipe: Recipe }>("GET", `/api/images/${of(id)}`),
  change: (id: string, change: { favourite?: boolean; tags?: string[] }) => ask<Picture>("PATCH", `/api/images/${of(id)}`, change),
  trash: (ids: readonly string[]) => ask<{ images: Picture[] }>("POST", "/api/images/trash", { ids }),
  restore: (ids: readonly string[]) => ask<{ images: Picture[] }>("POST", "/api/images/restore", { ids }),
  purge: (ids: readonly string[]) => ask<{ images: Picture[] }>("POST", "/api/images/purge", { ids }),
  exported: (ids: readonly string[]) => send("POST", "/api/images/export", { ids }).then((answer) => answer.blob()),
  tags: () => ask<{ tags: { tag: string; count: number }[] }>("GET", "/api/tags"),
  recipe: (png: Blob) =>
    ask<{ recipe: Recipe; model_known: boolean; same_weights: boolean | null }>("POST", "/api/recipe", png),
};
