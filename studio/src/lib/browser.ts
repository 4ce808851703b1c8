/** What the browser does for the studio: keeping values, saving files, copying. */

export function recall<T>(key: string, fallback: T): T {
  try {
    const text = localStorage.getItem(`linocut.${key}`);
    return text === null ? fallback : (JSON.parse(text) as T);
  } catch {
    return fallback;
  }
}

export function keep(key: string, value: unknown): void {
  try {
    localStorage.setItem(`linocut.${key}`, JSON.stringify(value));
  } catch {
    // Storage may be full or forbidden; the studio works without.
  }
}

export function saveFile(url: string, name: string): void {
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
}

export function saveBlob(blob: Blob, name: string): void {
  const url = URL.createObjectURL(blob);
  saveFile(url, name);
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** Browsers give the clipboard only to pages on this machine or over https. */
export function canCopy(): boolean {
  return window.isSecureContext && "clipboard" in navigator;
}

export async function copyImage(url: string): Promise<void> {
  const png = fetch(url).then((answer) => answer.blob());
  await navigator.clipboard.write([new ClipboardItem({ "image/png": png })]);
}

export async function copyText(text: string): Promise<void> {
  if (canCopy()) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** Whether a key press belongs to the field that has the focus. */
export function isTyping(target: EventTarget | null): boolean {
  return target instanceof HTMLElement
    && (target.isContentEditable || /^(TEXTAREA|SELECT)$/.test(target.tagName)
      || (target instanceof HTMLInputElement && !/^(button|checkbox|radio)$/.test(target.type)));
}

export const commandKey = /Mac|iP(hone|ad)/.test(navigator.userAgent) ? "⌘" : "Ctrl";
