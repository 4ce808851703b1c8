// Lets the studio be installed and open at once. Only the page's own files are kept: pictures and requests to the
// API always go to the server, so that nothing shown is stale.
const CACHE = "linocut-studio";

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

// Names of assets carry a hash of their content, so a kept one is never out of date.
async function kept(request) {
  const cache = await caches.open(CACHE);
  const found = await cache.match(request);
  if (found) return found;
  const fresh = await fetch(request);
  if (fresh.ok) await cache.put(request, fresh.clone());
  return fresh;
}

// The page itself names the assets, so the server's is asked for first.
async function freshPage(request) {
  const cache = await caches.open(CACHE);
  try {
    const fresh = await fetch(request);
    if (!fresh.ok) return fresh;
    const page = await fresh.clone().text();
    await cache.put("/", fresh.clone());
    for (const old of await cache.keys()) {
      const path = new URL(old.url).pathname;
      if (path.startsWith("/assets/") && !page.includes(path)) await cache.delete(old);
    }
    return fresh;
  } catch {
    return (await cache.match("/")) ?? Response.error();
  }
}

self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  if (event.request.method !== "GET" || url.origin !== location.origin) return;
  if (event.request.mode === "navigate" && url.pathname === "/" && !url.search) {
    event.respondWith(freshPage(event.request));
  } else if (url.pathname.startsWith("/assets/")) {
    event.respondWith(kept(event.request));
  }
});
