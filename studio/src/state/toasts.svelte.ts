/** Short messages at the foot of the page; one may carry a way back, such as Undo. */

export interface Toast {
  id: number;
  text: string;
  kind: "note" | "error";
  action?: { label: string; run: () => void };
}

const LASTS_MS = 6000;
const UNDO_LASTS_MS = 12_000;

class Toasts {
  list = $state<Toast[]>([]);
  #next = 1;

  say(text: string, action?: Toast["action"]): void {
    this.#add({ id: this.#next++, text, kind: "note", action }, action ? UNDO_LASTS_MS : LASTS_MS);
  }

  /** Errors stay until they are dismissed: they say what to do. */
  fail(error: unknown): void {
    const text = error instanceof Error ? error.message : String(error);
    if (!this.list.some((toast) => toast.text === text)) this.#add({ id: this.#next++, text, kind: "error" });
  }

  dismiss(id: number): void {
    this.list = this.list.filter((toast) => toast.id !== id);
  }

  #add(toast: Toast, lasts?: number): void {
    this.list = [...this.list.slice(-3), toast];
    if (lasts) setTimeout(() => this.dismiss(toast.id), lasts);
  }
}

export const toasts = new Toasts();
